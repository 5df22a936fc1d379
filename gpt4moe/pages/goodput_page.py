"""The report's "where the time went": one bar of the wall time, and the seconds behind it."""

from gpt4moe.runlog.goodput import CAUSES, PRODUCTIVE, Goodput

_COLOURS = {
    PRODUCTIVE: "var(--good)", "start_up": "var(--c0)", "redone": "var(--dead)", "checkpoint": "var(--l0)",
    "evaluation": "var(--l1)", "replica_check": "var(--under)", "report": "var(--c2)", "other": "var(--soft)",
    "queue": "var(--over)", "down": "var(--bad)",
}  # fmt: skip
_SMALLEST_SECONDS = 0.05
"""Less is not shown: it would print as 0.0."""


def goodput_section(account: Goodput) -> str:
    """HTML; nothing for a run without a second."""
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
    restarts = len(account.attempts) - 1
    return (
        f'<p class="verdict"><b>Goodput {account.share:.1%}</b>: {account.seconds[PRODUCTIVE]:,.1f} s of steps that '
        f"count in {account.wall_seconds:,.1f} s, {restarts} restart{'' if restarts == 1 else 's'}.</p>"
        f'<div role="img" aria-label="Wall time by cause" style="display:flex;height:18px;margin:14px 0;'
        f'border-radius:6px;overflow:hidden">{parts}</div>'
        f'<div class="table"><table><tbody>{rows}</tbody></table></div>'
    )


def _name(cause: str) -> str:
    return cause.replace("_", " ")
