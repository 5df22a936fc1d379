"""The results for people, and as JSON."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt4moe.launch.evidence import CheckResult, Evidence, Status

STYLES = {Status.passed: "green", Status.warned: "yellow", Status.failed: "bold red", Status.not_checked: "dim"}


def show(evidence: Evidence, results: list[CheckResult], console: Console) -> None:
    """A table, what to do about each row that is not good, and the verdict."""
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


def as_data(evidence: Evidence, results: list[CheckResult]) -> dict[str, Any]:
    """Everything as plain data."""
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
