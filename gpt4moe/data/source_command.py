"""What commands that make sources of a data folder share: options of a source, a bar of what is read, the answer."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpt4moe.errors import ConfigError

Progress = Callable[[int], None]


def named(text: str) -> tuple[str, str]:
    """NAME=VALUE of a command line that makes sources, as an argument's type."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def paths_of(text: str) -> list[Path]:
    """PATH[,PATH] of a command line."""
    return [Path(path) for path in text.split(",") if path]


def require_named_once(option: str, names: Sequence[str]) -> None:
    """Raises: ConfigError when an option NAME=VALUE gives a source twice."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"{option} {twice}= is given twice.", f"Give it once; several files as {option} {twice}=ONE,TWO."
        )


def require_source_options(given: argparse.Namespace) -> None:
    """Checks --source, --valid, --licence and --held-out. Raises: ConfigError for options that mean nothing."""
    names = [name for name, _ in given.source]
    for option in ("source", "valid", "licence"):
        require_named_once(f"--{option}", [name for name, _ in getattr(given, option)])
        for name, _ in getattr(given, option):
            if name not in names:
                raise ConfigError(f"--{option} names {name}, and --source does not.", "Name the same sources.")
    require_share("--held-out", given.held_out)


def require_share(option: str, share: float) -> None:
    """Raises: ConfigError for a number that is no share."""
    if not 0 <= share <= 1:
        raise ConfigError(f"{option} is {share}.", "It is a share, from 0 to 1.")


def make_sources(
    arguments: Sequence[str],
    unit: str,
    prepare: Callable[[Sequence[str], Progress], dict[str, Any]],
    summary: Callable[[str, Any], list[str]],
) -> int:
    """Runs a command that makes sources, with a bar on stderr and its answer on stdout: JSON where --json is given.

    Args:
        unit: what the bar counts.
        prepare: makes the sources; returns facts of each.
        summary: name and facts of a source -> lines for a person.
    Returns: the exit status.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn(f"{{task.completed:,}} {unit}"), TimeElapsedColumn())
    console = Console(stderr=True)
    # Where nobody watches, its last state would stand before an error's two lines.
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("prepare", total=None)
        words = [word for word in arguments if word != "--json"]
        answer = prepare(words, lambda count: progress.advance(task, count))
    lines = [json.dumps(answer)] if "--json" in arguments else []
    for name, facts in answer.items():
        lines += [] if "--json" in arguments else summary(name, facts)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0
