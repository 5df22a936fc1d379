"""configs/dashboard.yaml, read and checked: sections of panels, and alerts. For report.html, wandb and training.

YAML --read_dashboard--> Dashboard(sections of panels, alerts): every name is one of metrics_table.METRICS
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from gpt4moe.config.yaml_text import load_yaml
from gpt4moe.errors import ConfigError
from gpt4moe.runlog.alerts import ALERT_RULES, Alert, AlertRule, Stalled
from gpt4moe.runlog.metrics import Parts
from gpt4moe.runlog.metrics_table import METRICS, metric_of

logger = logging.getLogger(__name__)

# Not read by config.load, which imports Hydra: a list of runs reads this file too, and must be fast.
DASHBOARD_FILE = Path(__file__).resolve().parents[2] / "configs" / "dashboard.yaml"


class Scale(str, Enum):
    """Of the vertical axis. auto: logarithmic where values span more than a factor of 30."""

    linear = "linear"
    log = "log"
    auto = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    title: str
    metrics: list[str]
    """Names of metrics_table.METRICS; name/* is every part of one."""
    scale: Scale = Scale.linear
    wide: bool = False
    smooth: bool = False

    @property
    def unit(self) -> str:
        return metric_of(self.metrics[0]).unit


@dataclass(frozen=True, kw_only=True, slots=True)
class PanelSection:
    title: str
    panels: list[Panel]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dashboard:
    sections: list[PanelSection]
    alerts: list[Alert]


def read_dashboard(file: Path | str | None = None) -> Dashboard:
    """Reads and checks a dashboard.

    Args: file: tracking.dashboard; None: configs/dashboard.yaml.
    Raises: ConfigError with the place in the file, for anything that docs/dashboards.md does not allow.
    """
    path = DASHBOARD_FILE if file is None else Path(file)
    try:
        given = load_yaml(path.read_text())
    # ValueError: no UTF-8, an impossible date, a number of 5000 digits; lists in lists in lists.
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read: {why}.", "Give a YAML file like configs/dashboard.yaml.") from error
    reader = _Reader(path)
    top = reader.keys(given, "the file", required=("sections", "alerts"))
    return Dashboard(
        sections=reader.each(top["sections"], "sections", reader.section),
        alerts=reader.each(top["alerts"], "alerts", reader.alert),
    )


def dashboard_of(run_folder: Path) -> Dashboard:
    """The dashboard of a run's last launch, read from its file as it is now.

    Where that file is gone or wrong, the shipped dashboard: runs stay readable for longer than such files.
    """
    starts = sorted((run_folder / "starts").glob("*.yaml"))
    try:
        config = load_yaml(starts[-1].read_text())["config"] if starts else {}
        return read_dashboard(config.get("tracking", {}).get("dashboard"))
    except (ConfigError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        why = error.cause if isinstance(error, ConfigError) else f"{starts[-1]} is no record of a start."
        logger.warning("%s The shipped dashboard is taken.", why)
        return read_dashboard()


@dataclass(frozen=True, slots=True)
class _Limits:
    """What a number of an alert rule may be."""

    words: str
    allow: Callable[[float], bool]
    is_whole: bool = False


_MOST_STEPS = 1_000_000
_STEPS = _Limits(
    f"a whole number from 2 to {_MOST_STEPS:,}", lambda it: it == int(it) and 2 <= it <= _MOST_STEPS, is_whole=True
)
_ABOVE_0 = _Limits("a number above 0", lambda it: it > 0)
_LIMITS: dict[str, _Limits] = {
    "steps": _STEPS, "recent": _STEPS, "times": _ABOVE_0, "seconds": _ABOVE_0,
    "limit": _Limits("a number of 0 or more", lambda it: it >= 0),
    "share": _Limits("a number above 0 and below 1", lambda it: 0 < it < 1),
}  # fmt: skip
_TYPE_WORDS: dict[type, str] = {str: "some words", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class _Reader:
    """Turns plain YAML into the classes above. `place` is the place in the file, for errors."""

    path: Path

    def section(self, given: object, place: str) -> PanelSection:
        found = self.keys(given, place, required=("title", "panels"))
        panels = self.each(found["panels"], f"{place}.panels", self.panel)
        return PanelSection(title=self.a(str, found["title"], f"{place}.title"), panels=panels)

    def panel(self, given: object, place: str) -> Panel:
        found = self.keys(given, place, required=("title", "metrics"), optional=("scale", "wide", "smooth"))
        metrics = self.each(found["metrics"], f"{place}.metrics", self.metric)
        if len({metric_of(name).unit for name in metrics}) != 1:
            self.refuse(place, f"has metrics {metrics} of several units, or none", "Give one axis one unit.")
        if len(set(metrics)) < len(metrics):
            self.refuse(f"{place}.metrics", f"has one twice: {metrics}", "Name each once.")
        scale = self.one_of([it.value for it in Scale], found.get("scale", "linear"), f"{place}.scale")
        return Panel(
            title=self.a(str, found["title"], f"{place}.title"), metrics=metrics, scale=Scale(scale),
            wide=self.a(bool, found.get("wide", False), f"{place}.wide"),
            smooth=self.a(bool, found.get("smooth", False), f"{place}.smooth"),
        )  # fmt: skip

    def alert(self, given: object, place: str) -> Alert:
        kind = self.one_of(list(ALERT_RULES), given.get("rule") if isinstance(given, dict) else None, f"{place}.rule")
        settings = [f.name for f in fields(ALERT_RULES[kind])]  # type: ignore[arg-type]
        found = self.keys(given, place, required=("name", "metric", "rule", *settings))
        numbers = {name: self.number(found[name], f"{place}.{name}", _LIMITS[name]) for name in settings}
        metric = self.metric(found["metric"], f"{place}.metric")
        if "*" in metric:
            self.refuse(f"{place}.metric", f"is {metric!r}", "Name one metric.")
        if ALERT_RULES[kind] is Stalled and metric != "step_seconds":
            self.refuse(f"{place}.metric", f"is {metric}", "rule: stalled compares with step_seconds.")
        rule: AlertRule = ALERT_RULES[kind](**numbers)
        return Alert(name=self.a(str, found["name"], f"{place}.name"), metric=metric, rule=rule)

    def metric(self, given: object, place: str) -> str:
        name: str = self.a(str, given, place)
        whole, _, part = name.partition("/")
        has_parts = whole in METRICS and METRICS[whole].parts is not Parts.none
        if whole not in METRICS or (part and not (has_parts and part == "*")) or name == "step":
            self.refuse(
                place, f"is {_short(name)}, no metric", "docs/metrics.md lists them; name/* is for those with parts."
            )
        return name

    def one_of(self, allowed: Sequence[str], given: object, place: str) -> str:
        # Not `in` alone: a list cannot be hashed.
        if not isinstance(given, str) or given not in allowed:
            self.refuse(place, f"is {_short(given)}", f"Set one of {', '.join(allowed)}.")
        return given

    def number(self, given: object, place: str, limits: "_Limits") -> float:
        # Not below 1e15: NaN, infinity, and whole numbers that no float can hold.
        if isinstance(given, bool) or not isinstance(given, int | float) or not abs(given) < 1e15:
            self.refuse(place, f"is {_short(given)}", f"Set {limits.words}.")
        if not limits.allow(given):
            self.refuse(place, f"is {_short(given)}", f"Set {limits.words}.")
        return int(given) if limits.is_whole else given

    def each(self, given: object, place: str, read: Callable[[object, str], Any]) -> list[Any]:
        if not isinstance(given, list):
            self.refuse(place, "is no list", "Give a YAML list.")
        return [read(item, f"{place}[{number}]{_called(item)}") for number, item in enumerate(given)]

    def keys(
        self, given: object, place: str, *, required: Sequence[str], optional: Sequence[str] = ()
    ) -> Mapping[str, Any]:
        if not isinstance(given, dict) or not set(required) <= set(given) <= {*required, *optional}:
            has = f"has {_short(sorted(map(str, given)))}" if isinstance(given, dict) else f"is {_short(given)}"
            more = f", optionally {', '.join(optional)}" if optional else ""
            self.refuse(place, has, f"Give {', '.join(required)}{more}.")
        return given

    def a(self, kind: type, given: object, place: str) -> Any:
        if not isinstance(given, kind) or (isinstance(given, str) and not given.strip()):
            self.refuse(place, f"is {_short(given)}", f"Give {_TYPE_WORDS[kind]}.")
        return given

    def refuse(self, place: str, what: str, cure: str) -> NoReturn:
        raise ConfigError(f"{self.path}: {place} {what}.", cure)


def _called(item: object) -> str:
    """The name of a section, panel or alert, for the place in an error."""
    name = (item.get("title") or item.get("name")) if isinstance(item, dict) else None
    return f" ({_short(name)})" if isinstance(name, str) else ""


def _short(given: object) -> str:
    """At most 80 characters, for an error of one line."""
    text = repr(given)
    return text if len(text) <= 80 else f"{text[:77]}..."
