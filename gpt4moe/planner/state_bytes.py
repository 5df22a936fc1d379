"""Bytes of one parameter's states, as each engine holds them: one truth for memory, the search's lower bound, cures.

weight, fp32 gradient: on every rank that computes with it | master and moments: on the rank that owns it
"""

from gpt4moe.config.optimizer import Dtype, EngineKind
from gpt4moe.config.optimizer_table import OPTIMIZERS
from gpt4moe.config.run import RunConfig

VALUE_BYTES = {Dtype.bf16: 2, Dtype.fp32: 4}
"""Of a weight or an activation."""
GRADIENT_BYTES = 4
"""Main gradients are fp32."""
_STATE_BYTES = 4
"""Masters and the optimizer's state tensors are fp32."""


def owned_bytes(run: RunConfig) -> int:
    """Of the optimizer's states on the device, an element that a rank owns; 0 where they live in host memory."""
    if run.engine.offload_optimizer:
        return 0
    # Under Megatron the master of an fp32 weight is the weight itself; DeepSpeed keeps a copy.
    has_master = run.engine.kind is not EngineKind.megatron or run.precision.dtype is not Dtype.fp32
    return _STATE_BYTES * (has_master + len(OPTIMIZERS[run.optimizer.kind].states))
