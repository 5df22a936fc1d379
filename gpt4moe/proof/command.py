"""What tools/prove_layout.py does: reads its arguments, proves, prints the report; progress goes to stderr.

arguments --read--> ProofRequest --load--> run --prove--> report, exit status
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gpt4moe.config.load import load_run_config
from gpt4moe.errors import ConfigError
from gpt4moe.parallel import local_ranks
from gpt4moe.proof import proof_report
from gpt4moe.proof.plan import Phase
from gpt4moe.proof.prove import Outcomes, prove, run_on_ranks

EQUAL, DIFFERENT, UNDECIDED = 0, 1, 3
MOST_RANKS = 10**6
"""More ranks than this are taken for a typing error; finding their divisors would take hours."""


@dataclass(frozen=True, slots=True)
class ProofRequest:
    """The arguments of the tool."""

    overrides: list[str]
    ranks: int | None
    as_json: bool


def read(arguments: list[str]) -> ProofRequest:
    """Raises: ConfigError for another output than text or json, or a `ranks` that is not a number of ranks."""
    overrides, ranks, as_json = [], None, False
    for argument in arguments:
        key, _, value = argument.partition("=")
        if argument in ("--json", "output=json"):
            as_json = True
        elif key == "output" and value != "text":
            raise ConfigError(f"output={value} is no form of output.", "Write output=json, or leave it out.")
        elif key == "ranks":
            ranks = _number_of_ranks(value)
        elif key != "output":
            overrides.append(argument)
    if not any(override.lstrip("+").startswith("run.name=") for override in overrides):
        overrides.append("run.name=proof")
    return ProofRequest(overrides, ranks, as_json)


def _number_of_ranks(value: str) -> int:
    digits = value.lstrip("0") if value.isascii() and value.isdecimal() else ""
    if not digits:
        raise ConfigError(f"ranks={value} is no number of ranks.", "Write ranks=8, or leave it out.")
    if len(digits) > len(str(MOST_RANKS)) or int(digits) > MOST_RANKS:
        raise ConfigError(f"ranks={digits[:40]} is more than {MOST_RANKS}.", "Write ranks=8, or leave it out.")
    return int(digits)


def run(request: ProofRequest) -> int:
    """Proves and prints; returns the exit status. Raises: Gpt4MoeError for bad input."""
    asked = load_run_config(request.overrides)
    local_ranks.preload("gpt4moe.proof.preload")
    errors = Console(stderr=True, highlight=False)
    try:
        with _progress(errors) as bar:

            def start(world_size: int, phases: dict[str, Phase]) -> Outcomes:
                where = "one process" if world_size == 1 else f"{world_size} ranks"
                where += ", other tokens" if any(phase.tokens for phase in phases.values()) else ""
                task = bar.add_task(where, total=sum(phase.steps for phase in phases.values()))
                return run_on_ranks(world_size, phases, lambda _: bar.advance(task))

            proofs = prove(asked, request.ranks, start)
    except local_ranks.RanksFailed as failed:
        errors.print(failed.cause, markup=False, soft_wrap=True)
        errors.print("[bold red]DIFFERENT:[/] this layout does not run; the first rank that failed is above.")
        if request.as_json:
            sys.stdout.write(json.dumps(proof_report.failed_data(failed.cause), indent=1) + "\n")
        return DIFFERENT
    if request.as_json:
        sys.stdout.write(json.dumps(proof_report.as_data(proofs), indent=1, allow_nan=False) + "\n")
    else:
        proof_report.show(proofs, _console())
    if any(proof.is_different for proof in proofs):
        return DIFFERENT
    return EQUAL if all(proof.is_equal for proof in proofs) else UNDECIDED


def _console() -> Console:
    """Without a terminal, as wide as the widest table: a log keeps the heads of its columns."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield bar
