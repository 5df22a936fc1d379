"""The command tools/preflight.py: overrides in, a table or JSON out. Every rank runs it, rank 0 prints.

arguments --read--> PreflightRequest --run--> preflight --show, as_data--> table or JSON, exit status
"""

import json
import re
import sys
import warnings
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt4moe.config.load import load_run_config
from gpt4moe.errors import ConfigError
from gpt4moe.launch.evidence import WARNING_SECONDS, CheckResult, PreflightEvidence, Status
from gpt4moe.parallel.environment import Environment

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")


@dataclass(frozen=True, slots=True)
class PreflightRequest:
    """The arguments of tools/preflight.py."""

    overrides: list[str]
    ranks: int | None
    time_limit_seconds: float | None
    warning_seconds: float
    as_json: bool


def read(arguments: list[str]) -> PreflightRequest:
    """Parses the arguments. Raises: ConfigError for a value that cannot be parsed."""
    overrides, own = [], {"ranks": "", "time_limit": "", "signal": "", "output": "text"}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in own:
            own[key] = value
        elif argument != "--json":
            overrides.append(argument)
    if own["output"] not in ("text", "json"):
        raise ConfigError(f"output={own['output']} is not a form of output.", "Write output=json, or leave it out.")
    if own["ranks"] and not re.fullmatch(r"[1-9]\d*", own["ranks"]):
        raise ConfigError(f"ranks={own['ranks']} is not a number of ranks.", "Write ranks=24960, or leave it out.")
    if not any(override.lstrip("+").startswith("run.name=") for override in overrides):
        overrides.append("run.name=preflight")
    return PreflightRequest(
        overrides=overrides,
        ranks=int(own["ranks"]) if own["ranks"] else None,
        time_limit_seconds=seconds_of(own["time_limit"]),
        warning_seconds=warning_of(own["signal"]) if own["signal"] else WARNING_SECONDS,
        as_json="--json" in arguments or own["output"] == "json",
    )


def seconds_of(time_limit: str) -> float | None:
    """Seconds of a time limit as Slurm writes it: 90 (minutes), 90:30, 24:00:00, 1-12, 1-12:30:00.

    Returns: None for no limit (empty, UNLIMITED).
    """
    if time_limit.upper() in ("", "UNLIMITED", "INFINITE"):
        return None
    match = _TIME.fullmatch(time_limit)
    if match is None:
        raise ConfigError(f"time_limit={time_limit} is not a time.", "Write time_limit=24:00:00, or 1-12:00:00.")
    parts = [int(part) for part in match["clock"].split(":")]
    if match["days"] is not None:  # hours first
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) < 3:  # minutes first
        hours, minutes, seconds = 0, *[*parts, 0][:2]
    else:
        hours, minutes, seconds = parts
    return 86400 * int(match["days"] or 0) + 3600 * hours + 60 * minutes + float(seconds)


def warning_of(signal: str) -> float:
    """Seconds between the signal of sbatch's --signal and the time limit.

    Raises: ConfigError for a signal that slurm/train.sh does not handle.
    """
    match = re.fullmatch(r"B:(?:SIG)?USR1(?:@(\d{1,5}))?", signal)
    if match is None:
        raise ConfigError(f"signal={signal} is none that slurm/train.sh listens to.", "Write signal=B:USR1@300.")
    return float(match[1] or 60)  # sbatch's default


def run(request: PreflightRequest, environment: Environment) -> int:
    """The exit status: 0, or 1 when a check failed. Raises: Gpt4MoeError for bad input."""
    asked = load_run_config(request.overrides)
    world_size = request.ranks or environment.world_size
    if environment.world_size not in (1, world_size):
        raise ConfigError(
            f"ranks={world_size}, but {environment.source} started {environment.world_size}.",
            "Leave ranks out, or start one process.",
        )
    warnings.filterwarnings("ignore", module=r"(megatron|torch|deepspeed)\b")
    from gpt4moe.launch.preflight import exit_status, preflight

    answer = preflight(
        asked, environment, world_size=world_size, time_limit_seconds=request.time_limit_seconds,
        warning_seconds=request.warning_seconds,
    )  # fmt: skip
    if isinstance(answer, int):
        return answer
    evidence, results = answer
    if request.as_json:
        sys.stdout.write(json.dumps(as_data(evidence, results), indent=1) + "\n")
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
        show(evidence, results, console)
    sys.stdout.flush()
    return exit_status(results)


STYLES = {Status.passed: "green", Status.warned: "yellow", Status.failed: "bold red", Status.not_checked: "dim"}


def show(evidence: PreflightEvidence, results: list[CheckResult], console: Console) -> None:
    """Prints the table of results, a cure for each row that warns or fails, and the verdict."""
    run = evidence.run
    console.print(f"{run.run.name}: {run.model.name} on {run.cluster.name}, {evidence.world_size} ranks")
    table = Table("check", "result", "measured", "expected")
    for result in results:
        style = STYLES[result.status]
        table.add_row(result.name, Text(result.status.value, style), Text(result.measured), Text(result.expected))
    console.print(table)
    for result in results:
        if result.cure:
            line = Text.assemble((f"{result.status.value} ", STYLES[result.status]), f"{result.name}: {result.cure}")
            console.print(line, soft_wrap=True)
    count = {status: sum(result.status is status for result in results) for status in Status}
    verdict = ", ".join(f"{number} {status.value}" for status, number in count.items() if number)
    good = not count[Status.failed]
    console.print(
        Text.assemble(
            ("FIT TO RUN" if good else "NOT FIT TO RUN", "bold green" if good else "bold red"), f": {verdict}"
        )
    )


def as_data(evidence: PreflightEvidence, results: list[CheckResult]) -> dict[str, Any]:
    """The results as plain data, for JSON."""
    return {
        "fit": not any(result.status is Status.failed for result in results),
        "world_size": evidence.world_size,
        "started": evidence.started,
        "nodes": sorted({facts.host for facts in evidence.facts.values()}),
        "layout": evidence.layout.describe() if evidence.layout else None,
        "checks": [
            {
                "name": result.name, "status": result.status.value, "measured": result.measured,
                "expected": result.expected, "cure": result.cure,
            }
            for result in results
        ],
    }  # fmt: skip
