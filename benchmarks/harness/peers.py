"""The same model and the same whole step by other stacks, each at its best setting on a CPU.

Each gets the weights of `chunks`, a model of ours, and gives the call that makes a step, and how many weights this rank
has.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from benchmarks.harness.same_weights import fill_megatron, fill_mixtral
from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import Batch
from gpt4moe.model.attention import SdpaAttention
from gpt4moe.model.specs import norm_class
from gpt4moe.model.transformer_config import transformer_config
from gpt4moe.parallel.cpu_device import BuildOnCpu
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.placement import rank_chunks

Step = Callable[[], float | None]
"""Returns the mean loss of the step's tokens, without auxiliary terms; None where no stage of this rank has it."""
Model = list[nn.Module]


def mixtral(chunks: Model, run: RunConfig, groups: ProcessGroups, batches: list[Batch]) -> tuple[Step, int]:
    """Hugging Face's: scaled_dot_product_attention, grouped_mm, fused AdamW, load-balancing loss; with several ranks
    torch's DistributedDataParallel, which reduces in the last micro-batch alone. Only where no layer is cut."""
    from transformers import MixtralConfig, MixtralForCausalLM

    model, moe = run.model, run.model.moe
    assert moe is not None
    config = MixtralConfig(
        vocab_size=model.vocab_size, hidden_size=model.hidden_size, intermediate_size=moe.ffn_hidden_size,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.query_groups, max_position_embeddings=model.seq_length,
        rms_norm_eps=model.norm_epsilon, rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        num_local_experts=moe.num_experts, num_experts_per_tok=moe.top_k, sliding_window=None, use_cache=False,
        attn_implementation="sdpa", experts_implementation="grouped_mm",
        output_router_logits=True, router_aux_loss_coef=moe.router.load_balancing_coefficient,
    )  # fmt: skip
    alone = MixtralForCausalLM(config).train()
    fill_mixtral(alone, chunks, model, groups)
    parameters = list(alone.parameters())
    optimizer = torch.optim.AdamW(parameters, **_adam(run), fused=True)
    whole: Any = alone
    if distributed.get_world_size() > 1:
        whole = nn.parallel.DistributedDataParallel(alone, gradient_as_bucket_view=True)

    def step() -> float:
        total = torch.zeros(())
        optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(batches, 1):
            with nullcontext() if whole is alone or number == len(batches) else whole.no_sync():
                out = whole(batch.tokens, labels=batch.labels, shift_labels=batch.labels)
                (out.loss / len(batches)).backward()
            total += (out.loss - config.router_aux_loss_coef * out.aux_loss).detach()
        nn.utils.clip_grad_norm_(parameters, run.optimizer.clip_norm)
        optimizer.step()
        return float(total) / len(batches)

    return step, sum(parameter.numel() for parameter in parameters)


def megatron(chunks: Model, run: RunConfig, groups: ProcessGroups, batches: list[Batch]) -> tuple[Step, int]:
    """Megatron-core's own MoE, schedule, DistributedDataParallel, DistributedOptimizer, clipping, load-balancing loss.

    Its all-gather dispatcher: the all-to-all one needs CUDA streams. With torch's fused AdamW and attention, which are
    faster than what it takes by itself.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    config = _megatron_config(run)
    (layers,) = rank_chunks(run.model.num_layers, run.parallel, groups.coordinate["pp"])
    stage, last = groups.coordinate["pp"], run.parallel.pp - 1
    with BuildOnCpu():
        model = GPTModel(
            config=config, transformer_layer_spec=_megatron_layers(run, len(layers)), vocab_size=run.model.vocab_size,
            max_sequence_length=run.model.seq_length, pre_process=stage == 0, post_process=stage == last,
            share_embeddings_and_output_weights=run.model.tied_embeddings, position_embedding_type="rope",
            rotary_base=run.model.rope_theta, pg_collection=groups.megatron,
        )  # fmt: skip
    fill_megatron(model, chunks)
    size = sum(parameter.numel() for parameter in model.parameters())
    wrapping = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=run.engine.overlap_grad_reduce,
    )  # fmt: skip
    wrapped: Any = DistributedDataParallel(config, wrapping, model, pg_collection=groups.megatron)
    settings = _adam(run)
    betas = settings.pop("betas")
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", **settings, adam_beta1=betas[0], adam_beta2=betas[1], clip_grad=run.optimizer.clip_norm,
            use_distributed_optimizer=True,
        ),
        [wrapped], use_gloo_process_groups=False, pg_collection=groups.megatron,
    )  # fmt: skip
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = wrapped.no_sync
    schedule = get_forward_backward_func(pp_size=groups.layout.pp, vp_size=None)

    def forward(iterator: Iterator[Batch], chunk: Any) -> tuple[Tensor, Any]:
        batch = next(iterator)
        return chunk(batch.tokens, batch.position_ids, None, labels=batch.labels), _summed

    @torch.compiler.set_stance("force_eager")  # what it would compile is as fast so, and needs no C++ compiler
    def step() -> float | None:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        losses = schedule(
            forward_step_func=forward, data_iterator=iter(batches), model=wrapped, num_microbatches=len(batches),
            seq_length=run.model.seq_length, micro_batch_size=run.training.micro_batch_size, forward_only=False,
        )  # fmt: skip
        optimizer.step()
        return float(sum(of["loss"] for of in losses)) / (len(batches) * batches[0].tokens.numel()) if losses else None

    return step, size


def without_transformer_engine() -> None:
    """megatron-core 0.16.1 reads this name in its MoE although it never imported it then; 0.19.2 sets it so."""
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None


def _summed(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total = losses.sum()
    return total, torch.tensor(losses.numel(), dtype=torch.int), {"loss": total.detach()}


def _adam(run: RunConfig) -> dict[str, Any]:
    settings = run.optimizer
    return {"lr": settings.lr, "betas": (settings.beta1, settings.beta2), "weight_decay": settings.weight_decay}


def _megatron_config(run: RunConfig) -> Any:
    moe = run.model.moe
    assert moe is not None
    return replace(
        transformer_config(run.model, run.parallel, run.precision.dtype, on_gpu=False),
        num_moe_experts=moe.num_experts, moe_router_topk=moe.top_k, moe_ffn_hidden_size=moe.ffn_hidden_size,
        expert_model_parallel_size=run.parallel.ep, expert_tensor_parallel_size=run.parallel.etp,
        moe_token_dispatcher_type="allgather", moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=moe.router.load_balancing_coefficient, moe_router_dtype="fp32",
    )  # fmt: skip


def _megatron_layers(run: RunConfig, number: int) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    without_transformer_engine()
    moe_utils.get_moe_layer_wise_logging_tracker().clear()  # of a model before, which may have had fewer layers
    assert run.model.moe is not None
    norm = norm_class(run.kernels.norm)  # Megatron's local one refuses sequence parallelism
    specs = []
    for _ in range(number):
        spec = get_gpt_layer_local_spec(
            num_experts=run.model.moe.num_experts, moe_grouped_gemm=False, normalization="RMSNorm"
        )
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
        spec.submodules.self_attention.submodules.core_attention = SdpaAttention
        specs.append(spec)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)
