"""The progress of a run for a person: a live bar on a terminal, single lines in a pipe or a Slurm log.

    step 20/200  loss 3.4567  eval 3.5102  12.3k tokens/s  eta 0:01:20

Only the logging rank makes one.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from gpt4moe.runlog.metrics import Number
from gpt4moe.runlog.usage import Pace

SECONDS_BETWEEN_LINES = 5.0


def short_count(value: float, digits: int = 3) -> str:
    """Three digits and a letter: 12345 -> 12.3k."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 0.9995: from there on %.3g rounds up into the next letter.
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def clock_time(seconds: float) -> str:
    """0:01:20; days count as hours."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


class Console:
    """The progress of one launch of a run: from `start()` to `close()`."""

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        run_name: str,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        tokens: Callable[[int], int] | None = None,
    ):
        """
        Args:
            total_steps: the step to stop at, counted from the run's beginning.
            start_step: steps already done (the checkpoint's step); 0 at first.
            stream: stdout by default.
            clock: seconds, for the remaining time and the pace of lines.
            tokens: Pace's.
        """
        stream = stream or sys.stdout
        self.total_steps = total_steps
        self.start_step = start_step
        self.run_name = run_name
        self._pace = Pace(clock, tokens)
        # Asked of the stream, not of rich: FORCE_COLOR and the like must not put a bar into a log file.
        live = stream.isatty()
        self._rich = RichConsole(file=stream, highlight=False, force_terminal=live)
        self._progress = self._bar() if live and not self._rich.is_dumb_terminal else None
        self._task = TaskID(0)
        self._last_line = float("-inf")
        self._eval_loss: Number | None = None

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}", style="cyan", markup=False),
            console=self._rich,
            expand=True,
            refresh_per_second=4,
        )

    def start(self) -> None:
        """Shows the bar, or prints that the run begins."""
        self._pace.mark(self.start_step)
        if self._progress is None:
            begin = "start" if self.start_step == 0 else f"resume after step {self.start_step}"
            self._line(f"{self.run_name}: {begin}, to step {self.total_steps}")
            return
        self._task = self._progress.add_task(
            self.run_name, total=self.total_steps, completed=self.start_step, numbers="first step ..."
        )
        self._progress.start()

    def step(self, record: Mapping[str, Number]) -> None:
        """Shows one finished step. A log gets the first, the last, those that evaluate, else one every few seconds."""
        step = int(record["step"])
        now = self._pace.mark(step)
        self._eval_loss = record.get("eval_loss", self._eval_loss)
        numbers = self._numbers(record)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=numbers)
            return
        is_end = step in (self.start_step + 1, self.total_steps)
        if is_end or "eval_loss" in record or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._line(f"step {step}/{self.total_steps}  {numbers}")

    def message(self, text: str) -> None:
        """Prints one line, above the bar."""
        self._line(text)

    def close(self) -> None:
        """Leaves the bar as it is. A second call does nothing."""
        if self._progress is not None:
            self._progress.stop()

    def _numbers(self, record: Mapping[str, Number]) -> str:
        eta = self._pace.eta_seconds(self.total_steps)
        parts = [
            f"loss {record['loss']:.4f}" if "loss" in record else "",
            f"eval {self._eval_loss:.4f}" if self._eval_loss is not None else "",
            f"{short_count(record['tokens_per_second'])} tokens/s" if "tokens_per_second" in record else "",
            f"eta {clock_time(eta)}" if eta is not None else "",
        ]
        return "  ".join(part for part in parts if part)

    def _line(self, text: str) -> None:
        self._rich.print(text, markup=False, soft_wrap=True)
