"""Tables for a terminal: one line for each run; or one run in detail, with its time by cause and its launches."""

import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from textwrap import shorten

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from gpt4moe.operations.run_status import RunStatus
from gpt4moe.runlog.console import clock_time, short_count
from gpt4moe.runlog.goodput import CAUSES, PRODUCTIVE, Goodput
from gpt4moe.runlog.interruptions import Interruption

STATES = {
    "running": "bold green", "finished": "green", "waiting": "yellow", "stopped": "yellow", "failed": "bold red",
    "killed": "bold red", "damaged": "bold red", "unknown": "magenta",
}  # fmt: skip
_NONE = "-"
_CAUSE_LETTERS = 90
_SHOWN = 3
"""A run's line has at most so many alerts and damaged files; `show` has all."""


def print_runs(runs: Sequence[RunStatus], *, is_detailed: bool) -> None:
    """Prints to stdout, 200 columns wide into a pipe. Args: is_detailed: print each run's account too."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    now = time.time()
    parts = (part for run in runs for part in run_details(run, now)) if is_detailed else [runs_table(runs, now)]
    for part in parts if runs else ["No runs."]:
        console.print(part)


def runs_table(runs: Sequence[RunStatus], now: float) -> Table:
    """A line for each run."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("run", overflow="fold", min_width=8)
    for column in ("state", "job"):
        table.add_column(column, overflow="fold", min_width=8)
    for column in ("step", "loss", "tokens/s", "ETA", "restarts", "goodput", "seen"):
        table.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            Text(_printable(run.name), style="bold"),
            _state(run),
            job_text(run),
            f"{run.step:,}/{run.total_steps:,}" if run.total_steps is not None else f"{run.step:,}",
            _NONE if run.loss is None else f"{run.loss:.4f}",
            _NONE if run.tokens_per_second is None else short_count(run.tokens_per_second),
            _NONE if run.eta_seconds is None else clock_time(run.eta_seconds),
            str(run.restarts),
            _NONE if run.account is None else f"{run.account.share:.1%}",
            _NONE if run.last_seen is None else ago(now - run.last_seen),
        )
    return table


def ago(seconds: float) -> str:
    """A duration in one unit: 13 s, 5 min, 3 h, 2 d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def job_text(run: RunStatus) -> str:
    if run.job is None:
        return "not in a queue"
    return f"{run.job} {run.job_state or 'no longer known'}"


def run_details(run: RunStatus, now: float) -> Iterator[RenderableType]:
    """One run: its line, its seconds by cause, its launches."""
    yield runs_table([run], now)
    for alert in run.alerts:
        yield Text(f"alert: {alert.name}: {alert.text}", style="bold red")
    for told in run.went_back:
        yield Text(_printable(told), style="yellow")
    for doubt in run.suspect:
        yield Text(_printable(f"suspect checkpoint: {doubt}"), style="yellow")
    for wrong in run.wrong:
        yield Text(_printable(f"damaged: {wrong}"), style="bold red")
    yield ""
    if run.account is None:
        is_damaged = run.state == "damaged"
        yield "No account of a damaged run." if is_damaged else "No events.jsonl: nothing is known of its lost time."
        return
    yield _causes(run.account)
    yield ""
    yield _starts(run.account)
    if run.interruptions:
        yield ""
        yield _interruptions(run.interruptions)


def _state(run: RunStatus) -> Text:
    text = Text(_printable(f"{run.state} {run.why}".strip()), style=STATES[run.state])
    if run.doing is not None and (run.doing.kind or run.is_stuck):
        what = f"{'stuck ' if run.is_stuck else ''}in {run.doing.what or 'a step'} for {ago(run.doing.seconds)}"
        text.append(f", {what}", style="bold red" if run.is_stuck else "")
    bad = [*(alert.name for alert in run.alerts), *run.wrong]
    return text.append(
        f" ({', '.join(bad[:_SHOWN])}{', ...' if bad[_SHOWN:] else ''})" if bad else "", style="bold red"
    )


def _printable(text: str) -> str:
    """Replaces unprintable characters. A folder's name may have control characters, or not be UTF-8."""
    shown = text.encode(errors="replace").decode()
    return "".join(letter if letter.isprintable() else "?" for letter in shown)


def _causes(account: Goodput) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", title=None)
    for column in ("time", "seconds", "share"):
        table.add_column(column, justify="left" if column == "time" else "right")
    table.add_column("what it is")
    for cause, meaning in CAUSES.items():
        seconds = account.seconds[cause]
        look = "bold green" if cause == PRODUCTIVE else "" if abs(seconds) >= 0.05 else "dim"
        table.add_row(cause.replace("_", " "), f"{seconds:,.1f}", _share(seconds, account), meaning, style=look)
    table.add_row("wall time", f"{account.wall_seconds:,.1f}", _share(account.wall_seconds, account), "", style="bold")
    return table


def _share(seconds: float, account: Goodput) -> str:
    return f"{seconds / account.wall_seconds:.1%}" if account.wall_seconds > 0 else _NONE


def _starts(account: Goodput) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("start", "job", "began", "steps", "ended by", "lasted", "start-up", "queue before", "down before"):
        table.add_column(column, justify="right" if column not in ("began", "ended by") else "left")
    for number, attempt in enumerate(account.attempts, start=1):
        done = attempt.last_step - attempt.resumed_step
        table.add_row(
            str(number),
            str(attempt.job) if attempt.job is not None else _NONE,
            datetime.fromtimestamp(attempt.began).isoformat(sep=" ", timespec="seconds"),
            f"{attempt.resumed_step + 1:,} to {attempt.last_step:,}" if done else "none",
            attempt.end,
            clock_time(attempt.ended - attempt.began),
            *(clock_time(attempt.seconds[cause]) for cause in ("start_up", "queue", "down")),
        )
    return table


def _interruptions(found: Sequence[Interruption]) -> Table:
    """A line each."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("interrupted", "by", "after step", "rank", "steps redone", "cost"):
        is_number = column in ("after step", "steps redone", "cost")
        table.add_column(column, justify="right" if is_number else "left", no_wrap=True)
    table.add_column("cause", no_wrap=True)
    for it in found:
        table.add_row(
            datetime.fromtimestamp(it.at).isoformat(sep=" ", timespec="seconds"),
            _printable(it.what),
            f"{it.step:,}",
            _printable(it.where) or _NONE,
            f"{it.redone_steps:,}",
            clock_time(it.cost_seconds) if it.cost_seconds else _NONE,
            shorten(_printable(it.cause), _CAUSE_LETTERS, placeholder=" ...") or _NONE,
        )
    return table
