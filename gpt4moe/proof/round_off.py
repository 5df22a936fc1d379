"""Differences that round-off alone makes in a right layout, and what a proof does about each. numpy, no torch.

    what differs                         when round-off is believed                       then
    -----------------------------------  -----------------------------------------------  -------------------------
    a choice of experts (a tie)          the one process's choice was within 1e-5 of      other tokens are compared
                                         another, and nothing was wrong before it
    weights and moments after AdamW      one process moves as far when its weights are    the tolerance is measured
                                         moved by at most one fp32 rounding
    one number or tensor in bf16         it is off by less than twice what passes, and    other tokens are compared
                                         nothing else of that set of tokens is off

Round-off never excuses a difference by itself: EQUAL always means that every number of one whole set of tokens passed.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpt4moe.proof.compare import (
    ADAMW,
    NUMBERS,
    NumberDifference,
    TensorDifference,
    by_family,
    distance,
    floor_of,
    number_differences,
    root_mean_square,
    total_norm,
)
from gpt4moe.proof.outcome import Outcome

ROUND_OFF = 1e-5
"""In units of a router's score (a probability or a sigmoid, at most 1): how far fp32 sums in another order move it
within a proof's steps, at most; 1e-6 was seen after three steps of AdamW."""
TIMES = 3.0
"""A layout may be this many times as far from one process as that process is from itself: a sum that is cut over ranks
is rounded once more on each."""
LARGEST_MEASURED = 3e-3
"""No measured tolerance is wider. Real faults move moments by 0.1, and weights by 0.002 at least."""
FEWEST_NUDGED = 2
"""Runs that must be left to measure with."""
MARGINAL = 2.0
"""A bf16 number that is off by more than this many tolerances is a difference."""
_SLOT_IN_LOSS = 0.02
"""Share of the loss that one token without one of its experts moves, among the hundred tokens of a step."""


@dataclass(frozen=True, slots=True)
class Tie:
    """The first step whose choices differ."""

    step: int
    text: str


def turned_by_round_off(got: Outcome, want: Outcome) -> Tie | None:
    """The tie that explains why choices of experts differ; None when no tie does, or when none differ.

    A tie is two experts (or groups of experts) so nearly equal that round-off decides between them, or two tokens so
    nearly equal that round-off decides which of them gets an expert's last slot. From that token on two right layouts
    are two runs. Believed only when losses and loads were equal before that step and, in that step, at most a few
    choices moved and no token was lost.
    """
    loads = list(zip(got.columns(None), want.columns(None), strict=True))
    at = next((at for at, (ours, theirs) in enumerate(loads) if not np.array_equal(ours, theirs)), None)
    if at is None:
        return _slot_turned(got, want)
    # A token that loses one of its experts to another by a tie also chooses a little differently in later layers.
    by_slot = want.drop_margins[at] <= ROUND_OFF
    if not (want.margins[at] <= ROUND_OFF or by_slot):
        return None
    ours, theirs = loads[at]
    moved, total = float(np.abs(ours - theirs).sum()) / 2, float(theirs.sum())
    before = distance(np.array(got.losses[:at]), np.array(want.losses[:at]))
    if ours.sum() != total or moved > few(total) or before > 100 * NUMBERS["loss"].value:
        return None
    return Tie(
        at + 1,
        f"step {at + 1}: {moved:g} of {total:g} choices of experts differ; the nearest choice was "
        f"{want.margins[at]:.1e} from another{_slot_words(want.drop_margins[at]) if by_slot else ''}, where round-off "
        "decides",
    )


def _slot_words(margin: float) -> str:
    return f" and the nearest assignments at the end of an expert's slots {margin:.1e}"


def _slot_turned(got: Outcome, want: Outcome) -> Tie | None:
    """Loads are equal, for they count dropped assignments too: the tie is in the first step whose loss differs."""
    apart = [distance(np.array(a), np.array(b)) for a, b in zip(got.losses, want.losses, strict=True)]
    at = next((at for at, value in enumerate(apart) if not value <= NUMBERS["loss"].value), None)
    if at is None or not want.drop_margins[at] <= ROUND_OFF or not apart[at] <= _SLOT_IN_LOSS:
        return None
    return Tie(
        at + 1,
        f"step {at + 1}: every choice of experts is equal, the loss is not; the nearest assignments at the end of an "
        f"expert's slots were {want.drop_margins[at]:.1e} from each other, where round-off decides which is dropped",
    )


def few(total: float) -> float:
    """The most choices that ties may move at once, of `total`."""
    return 2 + 1e-3 * total


def same_choices(nudged: Sequence[Outcome], want: Outcome) -> list[Outcome]:
    """The nudged runs that chose the same experts as the run without a nudge. The others are other runs, and their
    distance is not round-off."""
    loads = want.columns(None)
    return [
        side
        for side in nudged
        if all(np.array_equal(ours, theirs) for ours, theirs in zip(side.columns(None), loads, strict=True))
    ]


def measured_tensors(
    tensors: list[TensorDifference], want: Outcome, nudged: Sequence[Outcome], widest: float = LARGEST_MEASURED
) -> list[TensorDifference]:
    """`tensors` of the AdamW phase, each with the tolerance that nudged runs of one process measure, where that is
    wider: TIMES the larger of the tensor's own root mean square over the runs and of its family's.

    Args:
        nudged: runs from weights that are at most one fp32 rounding away, at least FEWEST_NUDGED.
        widest: no measured tolerance is wider.
    """
    measured: dict[tuple[str, str], float] = {}
    for kind in ADAMW:
        norm = total_norm(want.tensors[kind])
        for names in by_family(want.tensors[kind]).values():
            own = {
                name: [_apart(side.tensors[kind][name], want.tensors[kind][name], kind, norm) for side in nudged]
                for name in names
            }
            spread = root_mean_square([value for values in own.values() for value in values])
            for name in names:
                measured[name, kind] = TIMES * max(root_mean_square(own[name]), spread)
    return [
        dataclasses.replace(item, tolerance=_wider(item, measured.get((item.name, item.kind), 0.0), widest))
        for item in tensors
    ]


def _apart(ours: np.ndarray, reference: np.ndarray, kind: str, norm: float) -> float:
    return distance(ours, reference, floor_of(kind, reference, norm))


def measured_numbers(
    numbers: list[NumberDifference], want: Outcome, nudged: Sequence[Outcome], scale: float
) -> list[NumberDifference]:
    """The same for losses, norms and statistics of the AdamW phase. Counts stay exact."""
    sides = [{item.name: item.relative for item in number_differences(side, want, scale=scale)} for side in nudged]
    found = []
    for item in numbers:
        wide = TIMES * root_mean_square([side[item.name] for side in sides])
        tolerance = _wider(item, wide, LARGEST_MEASURED) if item.tolerance else 0.0
        passes = item.relative <= tolerance
        found.append(dataclasses.replace(item, tolerance=tolerance, first_step=0 if passes else item.first_step))
    return found


def _wider(item: TensorDifference | NumberDifference, measured: float, widest: float) -> float:
    return max(item.tolerance, min(widest, measured))


@dataclass(frozen=True, slots=True)
class Marginal:
    """The only thing of a set of tokens that differs, in bf16 and by little."""

    name: str
    text: str


def one_marginal(
    tensors: Sequence[TensorDifference], numbers: Sequence[NumberDifference], exact: Sequence[str]
) -> Marginal | None:
    """What differs in the bf16 phase when it is one tensor or one number, off by less than MARGINAL tolerances; else
    None. One scalar a step has a heavy tail: about one right layout in thirty has one beyond its tolerance.

    Args:
        exact: endings of kinds and names that round-off does not move.
    """
    wrong: list[TensorDifference | NumberDifference] = [item for item in tensors if item.is_different]
    wrong += [item for item in numbers if item.is_different]
    if len(wrong) != 1:
        return None
    (item,) = wrong
    label = f"{item.kind} of {item.name}" if isinstance(item, TensorDifference) else f"bf16 {item.name}"
    kind = item.kind if isinstance(item, TensorDifference) else item.name
    if kind.endswith(tuple(exact)) or not item.relative <= MARGINAL * item.tolerance:
        return None
    return Marginal(label, f"{label} is {item.relative:.1e} off where {item.tolerance:.1e} passes, and nothing else is")
