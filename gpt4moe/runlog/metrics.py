"""What a metric is, and what one step's record is. No torch.

Each metric is declared beside what makes it, where the reading side can import it without torch:

    moe/statistics.py       LAYER_METRICS  auxiliary losses and routing, of the table of MoE layers
    runlog/step_metrics.py  STEP_METRICS   loss, update, time of one step; OBJECTIVE_METRICS
    runlog/usage.py         USAGE_METRICS  memory, device hours, money, time left
                            --> runlog/metrics_table.py  METRICS: the log, dashboards, alerts, docs/metrics.md

A metric with parts is also written once for each of them, as name/part: loss/code, router_entropy/layers_000_014. So
the number of keys in a record is bounded (moe.statistics.layer_groups).
"""

from dataclasses import dataclass
from enum import Enum

Number = int | float
Record = dict[str, Number]
"""One step's metrics by name, as in a line of metrics.jsonl."""


class Parts(str, Enum):
    """What a metric's parts are, if it has any."""

    none = ""
    sources = "data source"
    layers = "group of MoE layers"
    tasks = "task and score"


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One row of the table."""

    unit: str
    meaning: str
    parts: Parts = Parts.none
    """Written besides the whole; tasks have no whole."""
    is_timing: bool = False
    """Measured of the machine: may differ between two runs of one config."""
