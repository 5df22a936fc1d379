"""Our model and parallel configuration as Megatron's TransformerConfig. Nothing else translates between the two."""

import torch
from megatron.core.transformer import TransformerConfig

from gpt4moe.config.model import ModelConfig
from gpt4moe.config.optimizer import Dtype
from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.parallel.placement import stage_layers

TORCH_DTYPES = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, dtype: Dtype, *, on_gpu: bool, deterministic: bool = False
) -> TransformerConfig:
    """Megatron's configuration of a run. Its MoE settings stay off, because the experts are ours (moe.layer).

    Args:
        deterministic: Megatron's own choices of kernels, as training.deterministic; on GPUs alone.
    """
    weights = TORCH_DTYPES[dtype]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_size,
        qk_layernorm=model.qk_norm,
        ffn_hidden_size=model.ffn_hidden_size or 4 * model.hidden_size,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        pipeline_model_parallel_layout=_pipeline_layout(model, parallel),
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel_on,
        # Megatron's part: whole layers are recomputed by model.specs, experts by the room moe.
        recompute_granularity="selective" if parallel.recompute is Recompute.selective else None,
        recompute_modules=["core_attn"],
        params_dtype=weights,
        pipeline_dtype=weights,
        bf16=dtype is Dtype.bf16,
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,  # model.parameters.initialize fills every weight
        # The loss is a sum over the global batch divided by its tokens, known before the backward pass: Megatron
        # then scales nothing by data-parallel size or micro-batches (training.step).
        calculate_per_token_loss=True,
        batch_p2p_comm=batches_messages(parallel, on_gpu=on_gpu),
        batch_p2p_sync=False,  # a wait for the GPU after each exchange, for a mistake of torch below 2.0
        overlap_p2p_comm=parallel.vpp > 1,
        deterministic_mode=deterministic and on_gpu,
        deallocate_pipeline_outputs=False,
        variable_seq_lengths=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def batches_messages(parallel: ParallelConfig, *, on_gpu: bool) -> bool:
    """Whether the messages between stages of one exchange are posted as one batch, as Megatron-LM does by default.

    NCCL then takes the communicator of the pipeline's group; single messages would make one for each pair of ranks, at
    the first message. An interleaved schedule overlaps its messages with work instead: they are single ones. So are
    all on gloo, which gains nothing, and where those of an interleaved pp=2 would cross: previous and next stage are
    one rank.
    """
    return on_gpu and parallel.vpp == 1


def _pipeline_layout(model: ModelConfig, parallel: ParallelConfig) -> list[list[str]] | None:
    """placement.stage_layers as Megatron writes it, so that both place layers by one rule."""
    if parallel.pp == 1:
        return None
    chunks = [["decoder"] * len(layers) for layers in stage_layers(model.num_layers, parallel)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks
