"""Faults planted in a rank. Each function that marks a moment is replaced by one that first asks: is a fault due here?

Nothing of this is in the code that trains: a rank of the drill replaces functions before it calls train's main, as a
test double does. A fault comes once; before it does anything it leaves a file that says when, for the drill's clock.
"""

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gpt4moe.checkpoint import saving
from gpt4moe.drill.kinds import COMMIT, EVALUATION, RECOMPUTE_EVERY, RESUME, RETENTION, SAVE, START, STEP, Fault
from gpt4moe.training import build, loop
from gpt4moe.training.build import ENGINES
from gpt4moe.training.engine import Engine
from gpt4moe.training.step import StepRunner

_SLOWER_SECONDS = 1.0
_DISK_TAKES_BYTES = 1 << 16
"""Less than a checkpoint, more than a log of the drill: that has a disk of its own."""
_TRAIN_STEP, _LOSS, _PRUNE, _REDUCE = "train_step", "_scaled_loss", "prune", "reduce"


class Planted:
    """The faults of one launch in this rank.

    Args:
        folder: of the drill, for the notes; also pids of all ranks.
    """

    def __init__(self, faults: Sequence[Fault], rank: int, folder: Path):
        self.left, self.rank, self.folder = list(faults), rank, folder
        self.step = 0
        """The step in work, or the last one."""
        self.poisoned_step = -1
        """Whose loss is NaN, in every pass over it."""
        self.flips: random.Random | None = None
        """Draws the bit of the next reduced gradient that flips."""
        (folder / f"rank-{rank}.pid").write_text(str(os.getpid()))
        self._acts: dict[str, Callable[[], None]] = {
            "kill_rank": self._kill_own, "kill_saver": self._kill_own, "kill_all": self._kill_all,
            "checkpoint_bit": self._kill_all, "data_bit": self._kill_all, "hang": self._stop,
            "exception": self._raise, "nan": self._poison, "gradient_bit": self._flip, "full_disk": self._fill,
            "slow_disk": self._slow,
        }  # fmt: skip

    def at(self, moment: str) -> None:
        """Called at each moment; does what is due."""
        for fault in self.left:
            before_steps = moment in (START, RESUME)
            if fault.kind == "gradient_bit" and self.step % RECOMPUTE_EVERY:
                continue
            if fault.moment == moment and fault.rank == self.rank and (before_steps or self.step >= fault.step):
                self.left.remove(fault)
                note = self.folder / f"fault-{fault.number:03d}.tmp"
                note.write_text(f"{time.time()} {self.step}")
                note.replace(note.with_suffix(".came"))
                self._acts[fault.kind]()
                return

    def _kill_own(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _kill_all(self) -> None:
        for file in self.folder.glob("rank-*.pid"):
            if file.name != f"rank-{self.rank}.pid":
                os.kill(int(file.read_text()), signal.SIGKILL)
        self._kill_own()

    def _stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def _raise(self) -> None:
        raise RuntimeError("planted by the drill")

    def _poison(self) -> None:
        self.poisoned_step = self.step

    def _flip(self) -> None:
        self.flips = random.Random(self.step)

    def flip_gradient(self, engine: Engine) -> None:
        """Flips one bit of one gradient that this rank owns, where that is due."""
        if self.flips is None:
            return
        own, self.flips = self.flips, None
        gradient = own.choice([owned.gradient for owned in engine.owned() if owned.gradient.numel()])
        at = own.randrange(gradient.numel())
        gradient[at : at + 1].view(torch.int32).bitwise_xor_(1 << own.randrange(31))

    def _fill(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (_DISK_TAKES_BYTES, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def _slow(self) -> None:
        fsync, until = os.fsync, self.step + 3

        def slow(fd: Any) -> None:
            if self.step < until:
                time.sleep(_SLOWER_SECONDS)
            fsync(fd)

        os.fsync = slow


def plant(planted: Planted) -> None:
    """Replaces the functions at which the moments are, in the modules that call them."""
    for owner, name, moment in (
        (StepRunner, "forward_backward", STEP), (StepRunner, "evaluate", EVALUATION), (build, "load_source", RESUME),
        (saving, "write_file", SAVE), (saving, "commit", COMMIT),
    ):  # fmt: skip
        setattr(owner, name, _before(getattr(owner, name), planted, moment))
    setattr(loop, _TRAIN_STEP, _counted(getattr(loop, _TRAIN_STEP), planted))
    setattr(StepRunner, _LOSS, _poisoned(getattr(StepRunner, _LOSS), planted))
    for engine in ENGINES.values():
        setattr(engine, _REDUCE, _flipping(getattr(engine, _REDUCE), planted))
    setattr(saving, _PRUNE, _at_removals(getattr(saving, _PRUNE), planted))


def _before(function: Callable[..., Any], planted: Planted, moment: str) -> Callable[..., Any]:
    def instead(*given: Any, **more: Any) -> Any:
        planted.at(moment)
        return function(*given, **more)

    return instead


def _counted(function: Callable[..., Any], planted: Planted) -> Callable[..., Any]:
    def instead(runner: Any, step: int, *given: Any, **more: Any) -> Any:
        planted.step = step
        return function(runner, step, *given, **more)

    return instead


def _poisoned(function: Callable[..., Any], planted: Planted) -> Callable[..., Any]:
    def instead(*given: Any, **more: Any) -> Any:
        loss, count, logged = function(*given, **more)
        if planted.poisoned_step == planted.step:
            loss = loss * float("nan")
        return loss, count, logged

    return instead


def _flipping(reduce: Callable[[Engine], None], planted: Planted) -> Callable[[Engine], None]:
    def instead(engine: Engine) -> None:
        reduce(engine)
        planted.flip_gradient(engine)

    return instead


def _at_removals(prune: Callable[..., Any], planted: Planted) -> Callable[..., Any]:
    """Retention, during which the removal of a checkpoint is a moment."""

    def instead(*given: Any, **more: Any) -> Any:
        def rmtree(folder: Any, *given: Any, **more: Any) -> None:
            if (Path(folder) / saving.file_name(0)).exists():  # not the empty folder of a new save
                planted.at(RETENTION)
            removes(folder, *given, **more)

        removes, shutil.rmtree = shutil.rmtree, rmtree  # type: ignore[assignment]
        try:
            return prune(*given, **more)
        finally:
            shutil.rmtree = removes

    return instead
