"""Availability over time for report.html: a strip of the run's wall time, a line for each interruption; the slowest
rank."""

import html
from collections.abc import Sequence
from datetime import datetime

import numpy as np

from gpt4moe.runlog.console import clock_time
from gpt4moe.runlog.goodput import Goodput
from gpt4moe.runlog.interruptions import Interruption, shares_up
from gpt4moe.runlog.metrics_columns import MetricColumns

_SLOTS = 240
_HEIGHT = 36
_SHOWN = 50
"""Interruptions that are listed, the last ones; the strip has all."""


def availability_section(account: Goodput, found: Sequence[Interruption]) -> str:
    """HTML; empty for a run that was never interrupted.

    The strip has a bar for each part of the wall time: green up to the share in which steps were made, red above. What
    the parts are lost to is in the account beside it.
    """
    shares = shares_up(account.attempts, _SLOTS) if found else []
    if not shares:
        return ""
    first = account.attempts[0].began
    width = (max(attempt.ended for attempt in account.attempts) - first) / _SLOTS
    bars = "".join(_bar(slot, share, first + width * slot) for slot, share in enumerate(shares))
    whole = sum(shares) / len(shares)
    lost = sum(each.cost_seconds for each in found)
    more = f", the last {_SHOWN} of them below" if len(found) > _SHOWN else ""
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells(each))}</tr>" for each in found[-_SHOWN:]
    )
    head = "".join(f"<th>{name}</th>" for name in HEAD)
    return (
        f'<p class="verdict"><b>{whole:.1%}</b> of the wall time a launch made steps. {len(found)} '
        f"interruption{'' if len(found) == 1 else 's'} cost {clock_time(lost)}{more}.</p>"
        f'<svg role="img" aria-label="Availability over time" viewBox="0 0 {_SLOTS} {_HEIGHT}" '
        f'preserveAspectRatio="none" style="width:100%;height:{_HEIGHT}px;border-radius:6px">{bars}</svg>'
        f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def slowest_card(columns: MetricColumns) -> tuple[str, str, str] | None:
    """A card of the rank that was most often the busiest of its stage, of all readings of the ranks' beats, and by how
    much then; None: it was never measured."""
    ranks, ratios = columns.column("busiest_rank_ratio", x="busiest_rank")
    if not len(ranks):
        return None
    each, first, times = np.unique(ranks, return_index=True, return_counts=True)
    most = np.lexsort((first, -times))[0]
    ratio = np.median(ratios[ranks == each[most]])
    small = f"{ratio:.2f} times the work of the others of its stage, in {times[most]} of {len(ranks)} readings"
    return "Slowest rank", f"{each[most]:.0f}", small


HEAD = ("when", "what", "after step", "which rank or node", "steps redone", "cost", "cause")


def cells(it: Interruption) -> tuple[str, ...]:
    """An interruption as a row of HEAD."""
    return (
        datetime.fromtimestamp(it.at).isoformat(sep=" ", timespec="seconds"), it.what, f"{it.step:,}", it.where or "-",
        f"{it.redone_steps:,}", clock_time(it.cost_seconds) if it.cost_seconds else "-", it.cause or "-",
    )  # fmt: skip


def _bar(slot: int, share: float, began: float) -> str:
    up = share * _HEIGHT
    when = datetime.fromtimestamp(began).isoformat(sep=" ", timespec="seconds")
    down = f'<rect x="{slot}" y="0" width="1" height="{_HEIGHT - up:.1f}" fill="var(--bad)"/>' if share < 1 else ""
    made = f'<rect x="{slot}" y="{_HEIGHT - up:.1f}" width="1" height="{up:.1f}" fill="var(--good)"/>' if up else ""
    return f"<g><title>from {when}: {share:.0%}</title>{down}{made}</g>"
