"""States of engine=deepspeed: DeepSpeed's ZeRO-1 packs groups of parameters and cuts each over its copies.

    a tied embedding of two stages | dense matrices | norms | experts

Each is flat, padded to 2 x ranks, and every rank gets an equal cut of it.

Weights and fp32 gradients are whole on every rank, master and moments are of its cut (training.deepspeed_partition).
DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py.
"""

from dataclasses import dataclass

from gpt4moe.architecture.count import chunk_tensors
from gpt4moe.architecture.rows import Component, Spread
from gpt4moe.architecture.tensors import ModelTensor
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.state_bytes import GRADIENT_BYTES, VALUE_BYTES, owned_bytes

_ALIGNMENT = 2
"""Elements to which a rank's cut is padded."""
_STEP_BYTES = 4
"""One step count a group."""


@dataclass(frozen=True, slots=True)
class ZeroStates:
    """Bytes of one rank; all ranks of a stage hold equally much."""

    weights: int
    gradients: int
    optimizer: int
    """On the device: 0 where it lives in host memory."""


def zero_states(run: RunConfig, layout: Layout, stage: int) -> ZeroStates:
    """Of any rank of a pipeline stage of a legal layout."""
    groups: dict[str, tuple[int, int]] = {}  # name -> elements, ranks that share it
    for chunk in chunk_tensors(run.model, run.parallel, stage):
        for tensor in chunk:
            name = _group(tensor, is_tied=run.model.tied_embeddings and run.parallel.pp > 1)
            size, _ = groups.get(name, (0, 0))
            ranks = layout.expert_dp if name == "experts" else layout.dp * layout.cp
            groups[name] = size + tensor.local_size(run.parallel), ranks
    cuts = [(-(-size // (_ALIGNMENT * ranks)) * _ALIGNMENT, ranks) for size, ranks in groups.values()]
    whole = sum(cut * ranks for cut, ranks in cuts)
    owned = sum(cut * owned_bytes(run) + _STEP_BYTES for cut, _ in cuts)
    return ZeroStates(
        whole * VALUE_BYTES[run.precision.dtype],
        whole * GRADIENT_BYTES,
        0 if run.engine.offload_optimizer else owned,
    )


def _group(tensor: ModelTensor, *, is_tied: bool) -> str:
    """As training.engine_deepspeed groups them."""
    if tensor.spread is Spread.experts:
        return "experts"
    if is_tied and tensor.component is Component.embedding:
        return "tied"
    return "matrices" if len(tensor.shape) > 1 else "norms"
