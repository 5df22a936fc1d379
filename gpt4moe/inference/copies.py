"""Copies of the model whose ranks share experts (ep over dp): they take each step together, and end together.

    tokens of each copy's next step --maximum over the copies--> how long the step is, or that no copy has any
    an error of one copy            --in place of its tokens-->  all copies raise it

Other copies do not meet before all of their texts are done.
"""

from math import ceil

import torch
from torch import distributed

from gpt4moe.errors import Gpt4MoeError
from gpt4moe.parallel.agreement import raise_together
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.layout import Layout

_FAILED = 2**62
"""In place of a number of tokens: this copy takes no further step."""


def copies_step_together(layout: Layout) -> bool:
    """Whether the ranks of an expert belong to several copies of the model: then each step is one of all copies."""
    # The ranks of ep x etp are neighbours, and so are those of tp.
    return layout.tp % (layout.ep * layout.etp) != 0


def step_length(layout: Layout, num_tokens: int, most: int) -> tuple[int, bool]:
    """T of a step, and whether any copy that steps with this one has dummies in it.

    Args:
        num_tokens: new tokens of this copy.
        most: of the copy that has most.
    """
    # The ranks of one expert's parts (etp) must have equally many tokens.
    is_equal = layout.etp > 1 and copies_step_together(layout)
    length = layout.tp * ceil((most if is_equal else max(num_tokens, 1)) / layout.tp)
    return length, is_equal or length > num_tokens


class _OtherCopyFailedError(Gpt4MoeError):
    pass


class Copies:
    """What copies tell each other before each step."""

    def __init__(self, groups: ProcessGroups):
        self.groups = groups
        self.step_together = copies_step_together(groups.layout)

    def most_tokens(self, own: int) -> int:
        """New tokens in the next step of the copy that has most, or of this one where copies step apart. Collective
        over copies that step together. Raises: an error for end_together, when another copy has called it."""
        if not self.step_together:
            return own
        most = self._most(own)
        if most == _FAILED:
            raise _OtherCopyFailedError("Another copy has ended.", "")
        return most

    def end_together(self, error: Gpt4MoeError) -> None:
        """Before this copy leaves by an error, in place of its next step; on all of its ranks. Raises: it, or the one
        of the copy that failed, on every rank of copies that step together."""
        if not self.step_together:
            return
        is_mine = not isinstance(error, _OtherCopyFailedError)
        if is_mine:
            self._most(_FAILED)
        with raise_together(self.groups):
            if is_mine:
                raise error

    def _most(self, own: int) -> int:
        shared = torch.tensor([own], device=self.groups.device)
        distributed.all_reduce(shared, op=distributed.ReduceOp.MAX, group=self.groups.dp_cp)
        return int(shared.item())
