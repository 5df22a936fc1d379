"""What a proof does not show: it says so itself, in plain words. No torch."""

from gpt4moe.config.optimizer import Dtype, EngineKind
from gpt4moe.config.training import AttentionKernel, ExpertKernel, NormKernel
from gpt4moe.proof.depth import recomputes_in_part
from gpt4moe.proof.mesh import LARGEST_WORLD, lost, reductions
from gpt4moe.proof.shrink import Shrunk, changes


def unproved(meshes: list[Shrunk]) -> list[str]:
    """One line each, of the meshes that one asked run was proved on."""
    any_of_them = meshes[0]
    lines = (*_mesh(meshes), *_sizes(meshes), *_hardware(any_of_them), *_scope(any_of_them))
    return [line for line in lines if line]


def _mesh(meshes: list[Shrunk]) -> list[str]:
    asked, proved = meshes[0].asked_layout, [shrunk.layout for shrunk in meshes]
    has_experts, has_copies = meshes[0].run.model.moe is not None, any(layout.expert_dp > 1 for layout in proved)
    copies = "" if has_copies or not has_experts else (
        "copies of experts: no proved mesh has any, so nothing summed experts' gradients over expert_dp"
    )  # fmt: skip
    if proved[0] == asked:
        beside = [f"copies of experts on that mesh, which has none: they were proved on {layout.describe()}"
                  for layout in proved[1:]]  # fmt: skip
        whole = f"more data-parallel ranks than dp {asked.dp}: the mesh was proved whole, at {asked.world_size} ranks"
        return [whole, copies, *beside]
    return [
        copies,
        *(f"the mesh itself: {asked.world_size} ranks were reduced to {layout.world_size} "
          f"({', '.join(reductions(asked, layout))})" for layout in proved),
        *(f"{what}: {LARGEST_WORLD} ranks are too few" for what in lost(asked, proved)),
    ]  # fmt: skip


def _sizes(meshes: list[Shrunk]) -> list[str]:
    proved: dict[str, list[str]] = {}
    for shrunk in meshes:
        for key, before, after in changes(shrunk):
            values = proved.setdefault(f"{key} {before}", [])
            values += [after] if after not in values else []
    changed = [f"{key} -> {' or '.join(values)}" for key, values in proved.items()]
    lost_part = recomputes_in_part(meshes[0].asked) and not any(recomputes_in_part(shrunk.run) for shrunk in meshes)
    return [
        f"the sizes: {', '.join(changed)}" if changed else "",
        "a stage that is recomputed in part: none of the proved stages is" if lost_part else "",
    ]


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
        "bf16 beyond rounding: forward and backward pass lie as near to fp32 as those of one process in bf16; what is "
        "small (the auxiliary losses' gradient) and sums in bf16 that belong in fp32 (gradients, logits) may hide there"
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
