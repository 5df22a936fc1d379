"""A tie: two experts (or groups) so nearly equal that round-off decides between them, or two tokens so nearly equal
that it decides which gets an expert's last slot. numpy, no torch.

Two layouts are then two runs from that token on, and both are right. A tie is no excuse for a difference: the proof
takes other tokens and compares everything again. It is believed only with evidence for all of this:

    some choice of the one process was nearer to another than round-off moves a score
    until that step losses and loads were equal
    in that step at most a few choices moved, and no token was lost; or, of a slot, every load stayed equal and the loss
    moved by no more than a few tokens can make it
"""

from dataclasses import dataclass

import numpy as np

from gpt4moe.proof.compare import NUMBERS, distance
from gpt4moe.proof.outcome import Outcome

ROUND_OFF = 1e-5
"""In units of a score (a probability or a sigmoid, at most 1): what fp32 sums in another order move it by, at most,
within a proof's steps; 1e-6 was seen after three steps of AdamW."""

_SLOT_IN_LOSS = 0.02
"""Of the loss: what one token without one of its experts makes, among the hundred of a step."""


@dataclass(frozen=True, slots=True)
class Tie:
    """The first step whose choices differ."""

    step: int
    text: str


def turned_by_round_off(got: Outcome, want: Outcome) -> Tie | None:
    """The tie that explains why choices differ; None: no tie does, or none differ."""
    loads = list(zip(got.columns(None), want.columns(None), strict=True))
    at = next((at for at, (ours, theirs) in enumerate(loads) if not np.array_equal(ours, theirs)), None)
    if at is None:
        return _slot_turned(got, want)
    if not want.margins[at] <= ROUND_OFF:
        return None
    ours, theirs = loads[at]
    moved, total = float(np.abs(ours - theirs).sum()) / 2, float(theirs.sum())
    before = distance(np.array(got.losses[:at]), np.array(want.losses[:at]))
    if ours.sum() != total or moved > few(total) or before > 100 * NUMBERS["loss"].value:
        return None
    return Tie(
        at + 1,
        f"step {at + 1}: {moved:g} of {total:g} choices of experts differ; the nearest choice was "
        f"{want.margins[at]:.1e} from another, where round-off decides",
    )


def _slot_turned(got: Outcome, want: Outcome) -> Tie | None:
    """Loads, which count what is dropped too, are equal: the first step whose loss differs is the tie's."""
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
    """Choices that ties may move at once, of all."""
    return 2 + 1e-3 * total
