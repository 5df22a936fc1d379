"""Kinds of faults, the moments at which they come, and a plan of them that follows from a seed. No torch."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

STEP, SAVE, COMMIT, RETENTION, EVALUATION, START, RESUME = MOMENTS = (
    "step", "save", "commit", "retention", "evaluation", "start", "resume",
)  # fmt: skip
"""step: between the forward pass and the reduction; save: a rank's thread begins to write its file; commit: the first
rank's thread is about to write the manifest; retention: it is about to remove the oldest checkpoint; start: before the
ranks meet; resume: before a checkpoint is loaded."""
_OF_FIRST_RANK = (COMMIT, RETENTION)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A row of the table of faults."""

    meaning: str
    moments: tuple[str, ...] = MOMENTS
    statuses: tuple[int, ...] = ()
    """Exit statuses of a launch that this fault ends; none: it ends no launch. Before a bit flips in a file, all ranks
    are killed: the next launch must find it."""
    weight: int = 1
    """How often it comes, beside the others."""


_KILLED = (137,)
RECOMPUTE_EVERY = 3
"""resilience.recompute_every of the drilled run: a gradient's bit flips in such a step. Not the steps between saves."""
KINDS: dict[str, Kind] = {
    "kill_rank": Kind(meaning="kill -9 of one rank", statuses=_KILLED, weight=4),
    "kill_all": Kind(meaning="kill -9 of all ranks at once", statuses=_KILLED, weight=3),
    "kill_saver": Kind(
        meaning="kill -9 of a rank while its thread saves", moments=(SAVE, COMMIT, RETENTION), statuses=_KILLED,
        weight=3,
    ),
    "hang": Kind(meaning="SIGSTOP: a rank hangs", moments=(STEP, SAVE, EVALUATION), statuses=(86,), weight=2),
    "exception": Kind(meaning="an exception on one rank", statuses=(1, 2), weight=3),
    "nan": Kind(meaning="the loss of one rank is NaN (on_nonfinite=stop)", moments=(STEP,), statuses=(1,), weight=2),
    "full_disk": Kind(meaning="the disk takes no more (RLIMIT_FSIZE)", moments=(STEP, SAVE), statuses=(2,), weight=2),
    "slow_disk": Kind(meaning="every fsync takes 1 s longer, for one save", moments=(SAVE,), weight=1),
    "gradient_bit": Kind(
        meaning="a bit of a reduced gradient flips in a step that is computed twice", moments=(STEP,), statuses=(1,),
        weight=2,
    ),
    "checkpoint_bit": Kind(
        meaning="a bit of the newest checkpoint flips", moments=(STEP,), statuses=_KILLED, weight=2
    ),
    "data_bit": Kind(
        meaning="a bit of a data shard flips; the file is put back", moments=(STEP,), statuses=(2,), weight=2
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One fault of a plan."""

    number: int
    """From 1, in the order in which they come."""
    kind: str
    moment: str
    step: int
    """The first step at which it may come; for start and resume that of the launch makes no difference."""
    rank: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def draw(seed: int, count: int, *, ranks: int, every: int) -> list[Fault]:
    """A plan of `count` faults; every kind comes before one comes twice more than its weight says.

    Args:
        every: steps between two saves. The first fault comes after two saves, so that there is one to fall back to.
    """
    own = random.Random(seed)
    names: list[str] = []
    while len(names) < count:
        once = list(KINDS)
        own.shuffle(once)
        more = [name for name, kind in KINDS.items() for _ in range(kind.weight - 1)]
        own.shuffle(more)
        names += [*once, *more]
    faults, step = [], 2 * every + 1
    for number, name in enumerate(names[:count], start=1):
        step += own.randint(3, every + 3)
        moment = own.choice(KINDS[name].moments)
        rank = 0 if moment in _OF_FIRST_RANK or name == "full_disk" else own.randrange(ranks)
        faults.append(Fault(number=number, kind=name, moment=moment, step=step, rank=rank))
    return faults


def last_step(faults: Sequence[Fault], every: int) -> int:
    """Steps of the run: the last fault has a save and an evaluation behind it at which it can come."""
    return faults[-1].step + 3 * every


def of_launch(left: Sequence[Fault]) -> list[Fault]:
    """The faults of the next launch, of those that did not come yet: up to the first that ends it."""
    for number, fault in enumerate(left):
        if KINDS[fault.kind].statuses:
            return list(left[: number + 1])
    return list(left)
