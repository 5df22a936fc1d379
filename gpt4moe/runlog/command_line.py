"""How a command answers a person: its help, a user's mistake in two lines, its exit status."""

import io
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.text import Text

from gpt4moe.errors import INTERRUPTED, ConfigError, Gpt4MoeError


def print_error(cause: str, cure: str) -> None:
    """Prints a user's mistake to stderr, without a traceback: what is wrong, and what to do."""
    console = Console(stderr=True, highlight=False)
    for label, style, text in (("error:", "bold red", cause), ("fix:", "bold green", cure)):
        console.print(Text.assemble((label, style), " ", " ".join(text.split())), soft_wrap=True)


def split_arguments(
    arguments: list[str], own: tuple[str, ...], run_name: str
) -> tuple[dict[str, str], list[str], bool]:
    """A tool's own arguments KEY=VALUE, the overrides of a run, and whether JSON is asked for (--json, output=json).

    Args:
        own: the tool's keys, `output` among them.
        run_name: for a run that has no name.
    Raises: ConfigError for another output than text or json.
    """
    given = dict(a.split("=", 1) for a in arguments if a.partition("=")[0] in own and "=" in a)
    overrides = [a for a in arguments if a != "--json" and a.partition("=")[0] not in own]
    if not any(override.lstrip("+").startswith("run.name=") for override in overrides):
        overrides.append(f"run.name={run_name}")
    output = given.get("output", "text")
    if output not in ("text", "json"):
        raise ConfigError(f"output={output} is no form of output.", "Write output=json, or leave it out.")
    return given, overrides, "--json" in arguments or output == "json"


def run_tool(arguments: list[str], help_text: str | None, act: Callable[[list[str]], int]) -> int:
    """Runs a tool and returns its exit status; 130 when Ctrl-C stopped it.

    Args:
        arguments: of the command line; without any, and with -h or --help, the help is printed instead.
        act: the tool itself; returns its exit status.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write((help_text or "").lstrip())
        return 0 if arguments else 2
    try:
        return act(arguments)
    except Gpt4MoeError as error:
        print_error(error.cause, error.cure)
        return error.exit_code
    except KeyboardInterrupt:
        print_error("Stopped by Ctrl-C.", "Run the same command again.")
        return INTERRUPTED


def outlive_output() -> None:
    """From now on a stdout or stderr that takes no more (a full disk, a pipe whose reader has gone) ends nothing: what
    it does not take is dropped, after one warning on the other. For a command whose results are files."""
    for name, other in (("stdout", 2), ("stderr", 1)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue  # somebody's capture, or done before
        with suppress(OSError):
            stream.flush()
        raw = _Droppable(stream.fileno(), name, other)
        new = io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=True)
        setattr(sys, name, new)


class _Droppable(io.FileIO):
    """Args: other: file descriptor of the stream on which the first loss is told."""

    def __init__(self, file: int, name: str, other: int):
        super().__init__(file, "w", closefd=False)
        self.stream_name, self.other, self.has_told = name, other, False

    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
            if written is None:  # a full pipe that does not block: wait for its reader
                time.sleep(0.01)
            return written or 0
        except OSError as error:
            if not self.has_told:
                self.has_told = True
                with suppress(OSError):
                    os.write(self.other, f"warning: {self.stream_name} takes no more: {error.strerror}.\n".encode())
            return len(data)
