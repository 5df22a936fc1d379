"""Bytes of one parameter's states, as each engine holds them: one truth for memory, the search's lower bound, cures.

weight, fp32 gradient: on every rank that computes with it | master and moments: on the rank that owns it
"""

from gpt4moe.config.optimizer import Dtype, EngineKind
from gpt4moe.config.run import RunConfig

VALUE_BYTES = {Dtype.bf16: 2, Dtype.fp32: 4}
"""Of a weight or an activation."""
GRADIENT_BYTES = 4
"""Main gradients are fp32."""
_OWNED_BYTES = {
    (EngineKind.megatron, Dtype.bf16): 12,
    (EngineKind.megatron, Dtype.fp32): 8,  # the master of an fp32 weight is the weight
    (EngineKind.deepspeed, Dtype.bf16): 12,
    (EngineKind.deepspeed, Dtype.fp32): 12,  # a copy too
}
"""fp32 master and both moments."""


def owned_bytes(run: RunConfig) -> int:
    """Of the optimizer's states on the device, an element that a rank owns; 0 where they live in host memory."""
    return 0 if run.engine.offload_optimizer else _OWNED_BYTES[run.engine.kind, run.precision.dtype]
