"""Two sections of the report: bytes sent (counted and by formula), and wall time by cause (bar and table)."""

import html
from collections.abc import Mapping
from dataclasses import dataclass

from gpt4moe.planner.communication import Traffic
from gpt4moe.runlog.events_log import WENT_BACK
from gpt4moe.runlog.goodput import CAUSES, PRODUCTIVE, Goodput

MEANING = {
    "tp": "activations between the matrices of a block, norms' gradients", "cp": "keys and values",
    "tp_cp": "what routers pool", "ep": "tokens to their experts and back", "etp": "tokens of cut experts",
    "expert_dp": "experts: gradients scattered, weights gathered", "dp": "how many tokens the loss counts",
    "dp_cp": "dense parameters: gradients scattered, weights gathered", "pp": "activations and gradients of stages",
    "embedding": "a tied embedding's gradient", "world": "loss and routing for the log, the gradient norm",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class WireCount:
    """Bytes that all ranks send in one step: group -> kind of operation -> bytes."""

    step: int
    counted: Mapping[str, Mapping[str, int]]
    formula: Traffic
    """Bytes by formula, for even routing."""


def wire_table(wire: WireCount) -> str:
    """HTML: a row for each group and kind of operation, and one row for what the formulas leave out."""
    pairs = {(group, kind): None for sent in (wire.counted, wire.formula) for group in sent for kind in sent[group]}
    rows, total, more = [], 0.0, 0.0
    for group, kind in pairs:
        size, expected = (sent.get(group, {}).get(kind, 0.0) for sent in (wire.counted, wire.formula))
        total, more = total + size, more + size - expected
        cells = (group, kind.replace("_", "-"), MEANING.get(group, ""), *map(_size, (size, expected)))
        rows.append([html.escape(cell) for cell in cells])
    share = f"{more / total:.2%} of all: statistics, norms, padding, recomputation, uneven routing" if total else ""
    rows.append(["surplus", "", share, _size(more), ""])
    head = "".join(f"<th>{name}</th>" for name in ("group", "operation", "what for", "sent", "by formula"))
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f"<p>Counted at the collectives of step {wire.step}, all ranks together, as a ring sends them. Formulas assume "
        f'even routing.</p><div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _size(size: float) -> str:
    """Four digits and a unit: 1.234 MB."""
    if not size:
        return "none"
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size:.4g} B"


_COLOURS = {
    PRODUCTIVE: "var(--good)", "start_up": "var(--c0)", "redone": "var(--dead)", "checkpoint": "var(--l0)",
    "evaluation": "var(--l1)", "sampling": "var(--c4)", "replica_check": "var(--under)",
    "recompute": "var(--c1)", "report": "var(--c2)",
    "other": "var(--soft)", "queue": "var(--over)", "down": "var(--bad)",
}  # fmt: skip
_SMALLEST_SECONDS = 0.05
"""Smaller values are not shown, because they would print as 0.0."""


def goodput_section(account: Goodput) -> str:
    """HTML; empty if the run has no recorded time."""
    shown = [(cause, seconds) for cause, seconds in account.seconds.items() if seconds >= _SMALLEST_SECONDS]
    if not shown:
        return ""
    parts = "".join(
        f'<i title="{_name(cause)}" style="flex:{seconds:.3f} 0 0;background:{_COLOURS[cause]}"></i>'
        for cause, seconds in shown
    )
    rows = "".join(
        f'<tr><td><i style="display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:8px;'
        f'background:{_COLOURS[cause]}"></i>{_name(cause)}</td><td>{seconds:,.1f} s</td>'
        f"<td>{seconds / account.wall_seconds:.1%}</td><td>{CAUSES[cause]}</td></tr>"
        for cause, seconds in shown
    )
    restarts, went_back = account.restarts, sum(attempt.end == WENT_BACK for attempt in account.attempts)
    told = f", {went_back} going{'' if went_back == 1 else 's'} back" if went_back else ""
    return (
        f'<p class="verdict"><b>Goodput {account.share:.1%}</b>: {account.seconds[PRODUCTIVE]:,.1f} s of steps that '
        f"count in {account.wall_seconds:,.1f} s, {restarts} restart{'' if restarts == 1 else 's'}{told}.</p>"
        f'<div role="img" aria-label="Wall time by cause" style="display:flex;height:18px;margin:14px 0;'
        f'border-radius:6px;overflow:hidden">{parts}</div>'
        f'<div class="table"><table><tbody>{rows}</tbody></table></div>'
    )


def _name(cause: str) -> str:
    return cause.replace("_", " ")
