"""build_model: one Megatron GPTModel for each virtual stage of this rank, with initial weights.

placement.rank_chunks -> specs.block_spec -> GPTModel -> parameters.mark -> parameters.initialize
"""

import logging
from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from gpt4moe.architecture.trained import trained_names
from gpt4moe.config.run import RunConfig
from gpt4moe.model.adapters import attach
from gpt4moe.model.cross_entropy import FusedLossModel
from gpt4moe.model.parameters import decoder_layers, freeze, initialize, mark
from gpt4moe.model.resampler import VisionChunk
from gpt4moe.model.specs import block_spec
from gpt4moe.model.transformer_config import TORCH_DTYPES, transformer_config
from gpt4moe.moe.experts import kernel_for
from gpt4moe.parallel.cpu_device import BuildOnCpu
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.kernel_problems import DeviceKind, kernel_problems, missing_packages
from gpt4moe.parallel.legality import refuse
from gpt4moe.parallel.placement import rank_chunks


def build_model(
    run: RunConfig, groups: ProcessGroups, *, meta: bool = False, loaded: Collection[str] = ()
) -> list[Any]:
    """This rank's chunks with initial weights, in the order of its virtual stages; of a vision model the resampler's
    chunk is the last (model.parameters.language_chunks gives the others).

    Every parameter and buffer lies on `groups.device`, or on the meta device.

    Args:
        meta: only shapes, without memory and initial weights, to count a model of any size.
        loaded: KIND/NAME of tensors that the caller loads next, and that get no initial values.
    Raises: ConfigError or LayoutError when a kernel that was chosen does not take this torch, device or size, or a
        pattern of what is trained matches nothing.
    """
    _require_kernels(run, groups.device)
    on_gpu = groups.device.type == "cuda"
    config = transformer_config(
        run.model, run.parallel, run.precision.dtype, on_gpu=on_gpu and not meta,
        deterministic=run.training.deterministic,
    )  # fmt: skip
    # TransformerLayer warns about every MLP class that is not its own.
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    stages = rank_chunks(run.model.num_layers, run.parallel, groups.coordinate["pp"])
    chunks: list[Any] = []
    # Tensors that a module makes without naming a device (RMSNorm's weight) must lie beside the others.
    with torch.device("meta") if meta else groups.device, nullcontext() if on_gpu else BuildOnCpu():
        for vp_stage, layers in enumerate(stages):
            chunks.append(_build_chunk(run, groups, config, vp_stage, layers))
        if run.model.vision is not None:
            chunks.append(VisionChunk(config, run.model.vision))
    freeze(chunks, groups, trained_names(run.model, run.stage))
    mark(chunks, sequence_parallel=groups.layout.sequence_parallel)
    if not meta:
        initialize(chunks, run.model, groups, run.run.seed, loaded=loaded)
    return chunks


def _require_kernels(run: RunConfig, device: torch.device) -> None:
    kind = DeviceKind(is_gpu=False)
    if device.type == "cuda":
        kind = DeviceKind(is_gpu=True, capability=torch.cuda.get_device_capability(device))
    refuse([*kernel_problems(run, kind), *missing_packages(run, kind)])
    if run.model.moe is not None:
        kernel_for(run.kernels.experts, device, TORCH_DTYPES[run.precision.dtype])


def _build_chunk(
    run: RunConfig, groups: ProcessGroups, config: TransformerConfig, vp_stage: int, layers: list[int]
) -> GPTModel:
    model, pp_index = run.model, groups.coordinate["pp"]
    fused_loss = run.kernels.cross_entropy.is_triton(on_gpu=groups.device.type == "cuda")
    chunk = (FusedLossModel if fused_loss else GPTModel)(
        config=config,
        transformer_layer_spec=block_spec(run, groups, layers),
        vocab_size=model.vocab_size,
        max_sequence_length=model.seq_length,
        pre_process=pp_index == 0 and vp_stage == 0,
        post_process=pp_index == run.parallel.pp - 1 and vp_stage == run.parallel.vpp - 1,
        share_embeddings_and_output_weights=model.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,
        pg_collection=groups.megatron,
        vp_stage=vp_stage if run.parallel.vpp > 1 else None,
    )
    built = list(decoder_layers(chunk))
    assert built == layers, (built, layers)  # Megatron places layers as placement.py does
    attach(chunk, model)
    return chunk
