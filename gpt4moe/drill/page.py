"""The drill in words and tables: for the terminal, and for docs/drill.md between its markers."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

from gpt4moe.drill.account import Availability, Outcome, Result
from gpt4moe.drill.kinds import KINDS
from gpt4moe.errors import ConfigError
from gpt4moe.runlog.goodput import PRODUCTIVE

BEGIN, END = "<!-- made by make drill: begin -->", "<!-- made by make drill: end -->"
_HOURS = (0.5, 3.0, 24.0)
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "steps": ("steps that count", (PRODUCTIVE,)),
    "twice": ("steps computed once more and compared", ("recompute",)),
    "looks": ("evaluations, comparisons of copies, reports", ("evaluation", "sampling", "replica_check", "report")),
    "between": ("between steps: metrics, console", ("other",)),
    "saves": ("waiting for saves", ("checkpoint",)),
    "lost": ("steps lost, and made again", ("redone",)),
    "down": ("from a fault until no rank is left, and to the next first step", ("down", "queue", "start_up")),
}
"""Parts of the wall time: what each is, and its causes in runlog.goodput."""


def summary(result: Result) -> str:
    """Markdown: what was drilled, a row for each kind of fault, availability measured and by the formula."""
    came = len([outcome for outcome in result.outcomes if not outcome.wrong])
    ranks = "cold processes" if result.is_cold else "forks of a process that has made the imports"
    parts = [
        f"{len(result.outcomes)} faults, seed {result.seed}, in {result.steps} steps on {result.ranks} ranks "
        f"({ranks}), on CPUs that other programs used too: {came} survived.",
        table(result.outcomes),
        _whole(result),
    ]
    if result.availability is not None:
        parts.append(_availability(result.availability))
    return "\n\n".join(parts)


def table(outcomes: Sequence[Outcome]) -> str:
    """A row for each kind: tried, survived, means and the longest."""
    rows = [
        "| fault | tried | survived | steps redone | detected after, median (longest) | restarted after, median |",
        "|---|---|---|---|---|---|",
    ]
    for name, kind in KINDS.items():
        own = [outcome for outcome in outcomes if outcome.fault.kind == name]
        if not own:
            continue
        detect = [outcome.detect_seconds for outcome in own if outcome.detect_seconds is not None]
        whole = [outcome for outcome in own if not outcome.is_cut_off]
        restart = [outcome.restart_seconds for outcome in whole if outcome.restart_seconds is not None]
        rows.append(
            f"| {kind.meaning} | {len(own)} | {sum(not outcome.wrong for outcome in own)} | "
            + (f"{fmean(outcome.redone_steps for outcome in own):.1f} | " if detect else "none | ")
            + (f"{median(detect):.1f} s ({max(detect):.1f} s) | " if detect else "no rank ended | ")
            + (f"{median(restart):.1f} s |" if restart else "- |")
        )
    return "\n".join(rows)


def _whole(result: Result) -> str:
    wrong = [*result.wrong, *(f"fault {it.fault.number}: {it.wrong}" for it in result.outcomes if it.wrong)]
    if wrong:
        return "**Wrong:** " + "; ".join(wrong)
    return (
        "`metrics.jsonl` has every step once. Loss, gradient norm and held-out loss of each step, and the bytes of the "
        "last checkpoint, equal those of a run without faults."
    )


def _availability(it: Availability) -> str:
    between = it.wall_seconds / max(1, it.faults)
    hours = ", ".join(f"{1 - it.cost_seconds / (3600 * hours):.2%} at one in {hours:g} h" for hours in _HOURS)
    return (
        f"Availability, the share not lost to a fault or a save: **measured {it.measured:.1%}**, by "
        f"the formula 1 - (save {it.save_seconds:.2f} s + lost work "
        f"{it.lost_seconds:.2f} s + detect {it.detect_seconds:.2f} s + restart {it.restart_seconds:.2f} s) x one fault "
        f"in {between:.1f} s = **{it.formula:.1%}**, {it.points_apart:.1f} points apart. ETTR, the share of steps that "
        f"count: measured {it.productive:.1%}, by the formula less what is available and no step "
        f"{it.productive_by_formula:.1%}. The same seconds give {hours}.\n\n" + _parts(it)
    )


def _parts(it: Availability) -> str:
    """Where the wall time went: a row for each part, by the trainer's account and by the drill's clock."""
    clock = {
        "saves": it.save_seconds, "lost": it.lost_seconds, "down": it.detect_seconds + it.restart_seconds,
    }  # fmt: skip
    rows = ["| part of the time | trainer's account | drill's clock |", "|---|---|---|"]
    for key, (meaning, causes) in PARTS.items():
        own = f"{clock[key] * it.faults / it.wall_seconds:.1%}" if key in clock else ""
        rows.append(f"| {meaning} | {sum(it.shares[cause] for cause in causes):.1%} | {own} |")
    return "\n".join(rows)


def plan_keys(it: Availability) -> str:
    """The measured seconds as keys of tools/plan.py; without a restart time where every restart was cut off."""
    keys = [f"detect_seconds={it.detect_seconds:.3g}"]
    if it.whole_restart_seconds is not None:
        keys.append(f"restart_minutes={it.whole_restart_seconds / 60:.3g}")
    return " ".join(keys)


def write_block(page: Path, text: str) -> None:
    """Puts `text` between the markers of a page. Raises: ConfigError when it has none."""
    content = page.read_text()
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ConfigError(f"{page} has no {BEGIN} ... {END}.", "Give docs/drill.md.")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
