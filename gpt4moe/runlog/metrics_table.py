"""METRICS: the declarations of all that make metrics, in one table. The log, dashboards, alerts and docs ask it.

python -m gpt4moe.runlog.metrics_table           prints the table that docs/metrics.md has; a test compares the two
python -m gpt4moe.runlog.metrics_table --write   renews it there
"""

import sys
from collections.abc import Mapping, Sequence
from itertools import dropwhile
from pathlib import Path

from gpt4moe.errors import ConfigError
from gpt4moe.moe.statistics import LAYER_METRICS
from gpt4moe.runlog.metrics import Metric, Number, Parts
from gpt4moe.runlog.step_metrics import OBJECTIVE_METRICS, RANK_METRICS, STEP_METRICS, TIME_METRICS
from gpt4moe.runlog.usage import USAGE_METRICS

_ROUTING_METRICS: dict[str, Metric] = {
    name: Metric(unit=of.unit, meaning=of.meaning, parts=Parts.none if of.over_layers is None else Parts.layers)
    for name, of in LAYER_METRICS.items()
}
_OWN_METRICS: dict[str, Metric] = {**STEP_METRICS, **_ROUTING_METRICS, **TIME_METRICS, **RANK_METRICS, **USAGE_METRICS}
METRICS: dict[str, Metric] = {**_OWN_METRICS, **OBJECTIVE_METRICS}

TIMINGS = frozenset(name for name, metric in METRICS.items() if metric.is_timing)
"""What may differ between two runs of one config; every other metric is bitwise equal on a CPU."""


def known(name: str) -> bool:
    """Whether the table allows this name, a part's name included."""
    whole, _, part = name.partition("/")
    return whole in METRICS and (not part or METRICS[whole].parts is not Parts.none) and not name.endswith("/")


def refuse_undeclared(logged_names: Sequence[str]) -> None:
    """Checks the names that an objective logs (objectives.objective).

    Raises: ConfigError for a name that OBJECTIVE_METRICS does not declare, for one given twice, and for one that the
        run writes itself, because it would replace the run's own number.
    """
    for name in logged_names:
        if name.partition("/")[0] in _OWN_METRICS:
            raise ConfigError(
                f"The objective logs {name!r}, a metric that the run writes itself.",
                "Give it another name in the objective's logged_names.",
            )
        if name not in OBJECTIVE_METRICS:
            raise ConfigError(
                f"The objective logs {name!r}, which no metric declares.",
                "Declare it in OBJECTIVE_METRICS of gpt4moe/runlog/step_metrics.py, with unit and meaning.",
            )
        if logged_names.count(name) > 1:
            raise ConfigError(
                f"The objective logs {name!r} {logged_names.count(name)} times.", "Name it once in logged_names."
            )


def metric_of(name: str) -> Metric:
    """The row of a metric or of one of its parts."""
    return METRICS[name.partition("/")[0]]


def check_record(record: Mapping[str, Number]) -> None:
    """Raises: ValueError when a record has no step, or a name or a type that the table does not allow.

    For programmers: a user cannot cause it.
    """
    unknown = sorted(name for name in record if not known(name))
    if unknown:
        raise ValueError(f"metrics {unknown} are in no table; declare them beside what makes them (runlog/metrics.py)")
    # bool is an int to isinstance; a numpy or torch scalar is neither int nor float and would not be written exactly.
    odd = sorted(name for name, value in record.items() if isinstance(value, bool) or not isinstance(value, Number))
    if odd:
        raise ValueError(f"metrics {odd} are not plain int or float")
    step = record.get("step")
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"a record needs its step, an int from 1, not {step!r}")


def markdown() -> str:
    """A row for each metric: name, unit, parts, meaning."""
    rows = ["| name | unit | also for each | meaning |", "|---|---|---|---|"]
    for name, metric in METRICS.items():
        note = " (*)" if metric.is_timing else ""
        rows.append(f"| `{name}`{note} | {metric.unit} | {metric.parts.value} | {metric.meaning} |")
    return "\n".join(rows)


def renew(page: Path) -> None:
    """Replaces the table of a page, the lines from its head to the first line that is no row."""
    head, *_ = markdown().splitlines()
    before, found, after = page.read_text().partition(head)
    assert found, f"{page} has no table that begins with {head}"
    rest = after.splitlines(keepends=True)[1:]
    page.write_text(before + markdown() + "\n" + "".join(dropwhile(lambda line: line.startswith("|"), rest)))


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        renew(Path(__file__).resolve().parents[2] / "docs" / "metrics.md")
    else:
        sys.stdout.write(markdown() + "\n")
