"""What a proof does not show: it says so itself, in plain words. No torch."""

from gpt4moe.config.optimizer import Dtype, EngineKind
from gpt4moe.config.training import AttentionKernel, ExpertKernel, NormKernel
from gpt4moe.proof.mesh import lost_traits, reductions
from gpt4moe.proof.shrink import Shrunk, changes


def unproved(shrunk: Shrunk) -> list[str]:
    """One line each."""
    return [line for line in (*_mesh(shrunk), *_sizes(shrunk), *_hardware(shrunk), *_scope(shrunk)) if line]


def _mesh(shrunk: Shrunk) -> list[str]:
    asked, proved = shrunk.asked_layout, shrunk.layout
    if asked != proved:
        return [f"the mesh itself: {asked.world_size} ranks were reduced to {proved.world_size} "
                f"({', '.join(reductions(asked, proved))})",
                *(f"{name}: {proved.world_size} ranks are too few" for name in lost_traits(asked, proved))]  # fmt: skip
    return [f"more data-parallel ranks than dp {proved.dp}: the mesh was proved whole, at {proved.world_size} ranks"]


def _sizes(shrunk: Shrunk) -> list[str]:
    changed = [f"{key} {before} -> {after}" for key, before, after in changes(shrunk)]
    return [f"the sizes: {', '.join(changed)}"] if changed else []


def _hardware(shrunk: Shrunk) -> list[str]:
    kernels, run = shrunk.asked.kernels, shrunk.asked
    named = [
        (kernels.attention is AttentionKernel.transformer_engine, "Transformer Engine's attention"),
        (kernels.norm is NormKernel.apex, "apex's norm"),
        (kernels.experts is ExpertKernel.grouped_mm, "the grouped product of experts"),
    ]
    chosen = [name for is_chosen, name in named if is_chosen]
    extra = f", {' and '.join(chosen)} that this run chooses" if chosen else ""
    return [
        f"GPU kernels{extra}: torch's CPU kernels ran",
        "NCCL, and overlap of communication with computation on GPU streams: gloo ran",
        "bf16 beyond rounding: its gradients of one step lie as near to fp32 as those of one process in bf16"
        if run.precision.dtype is Dtype.bf16 else "",
    ]  # fmt: skip


def _scope(shrunk: Shrunk) -> list[str]:
    engine = shrunk.run.engine.kind
    return [
        "the data pipeline, checkpoints, learning-rate schedule, speed and memory: synthetic tokens, a few steps",
        f"engine={engine.value} against itself: the one process ran engine=megatron"
        if engine is not EngineKind.megatron else "",
        "anything after the first steps: round-off may flip a choice between two equally probable experts later",
    ]  # fmt: skip
