"""The table of metrics as Markdown; docs/metrics.md holds it, and a test holds the two together.

Run: python -m gpt4moe.runlog.metrics_table
"""

import sys

from gpt4moe.runlog.metrics import METRICS


def metrics_table() -> str:
    """A row for each metric: name, unit, parts, meaning."""
    rows = ["| name | unit | also for each | meaning |", "|---|---|---|---|"]
    for name, metric in METRICS.items():
        note = " (*)" if metric.is_timing else ""
        rows.append(f"| `{name}`{note} | {metric.unit} | {metric.parts.value} | {metric.meaning} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.stdout.write(metrics_table() + "\n")
