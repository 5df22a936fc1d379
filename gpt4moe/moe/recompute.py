"""Activations computed again in the backward pass instead of kept, as far as a MoE layer is concerned.

    parallel.recompute   kept of a MoE layer            run twice
    none                 rows [N, H], hidden [N, 2F]    nothing
    moe                  tokens [T, H], the plan        way to the experts, experts; the router decides and counts once
    full                 the layer's input              everything; decisions come out equal, statistics count once

T tokens of this rank, N rows that arrive at its experts, about top_k * T.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def recomputed(function: Callable[..., T]) -> Callable[..., T]:
    """`function`, of whose work nothing but the arguments is kept; the backward pass calls it again.

    Its collectives are then run once more, in the order of the backward pass: the same on every rank of a group.
    """
    # Nothing random happens between a token and its experts, so no random state is kept.
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


def is_second_forward() -> bool:
    """Whether this forward pass repeats one for the backward pass of Megatron's full recompute.

    Megatron runs a layer's first forward pass without gradients there, so a second one is the only with them.
    """
    return is_checkpointing() and torch.is_grad_enabled()
