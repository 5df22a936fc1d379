"""ExpertParallelMLP: router, dispatch and experts behind Megatron's MLP seam.

    hidden [S/tp, B, H] -> Router [T, E] -> Dispatcher.send -> Experts [P, H] -> Dispatcher.combine -> [S/tp, B, H]
                      \\-> shared experts, where the model has them ----------------------------------> +

Under sequence parallelism every tensor-parallel rank has other tokens, so experts may be spread over the same ranks
("parallel folding"), whole (ep) or each cut over its ffn (etp). What a router pools is one micro-batch, gathered over
tp x cp (pool.py).

What the backward pass computes again instead of keeping it:

    parallel.recompute   kept of a MoE layer            run twice
    none                 rows [P, H], hidden [P, 2F]    nothing
    moe                  tokens [T, H], the plan        way to the experts, experts; the router decides and counts once
    full                 the layer's input              everything; decisions come out equal, statistics count once

T tokens of this rank; P places at its experts: the rows that arrive, about top_k * T, and padding (dispatch.py).
"""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt4moe.config.kernels import ExpertKernel, FusedKernel, SwiGluKernel, swiglu_kernel
from gpt4moe.config.moe import MoEConfig
from gpt4moe.moe.dispatch import Dispatcher
from gpt4moe.moe.experts import Experts, kernel_for
from gpt4moe.moe.losses import AttachLoss, auxiliary_losses, load_of
from gpt4moe.moe.plan import Plan
from gpt4moe.moe.pool import TokenPool, kept_of_rank
from gpt4moe.moe.routers import build_router
from gpt4moe.moe.routers.base import Routing
from gpt4moe.moe.statistics import RoutedBatch, RoutingStatistics
from gpt4moe.parallel.groups import ProcessGroups

T = TypeVar("T")
Linear = tuple[type[nn.Module], type[nn.Module]]
"""Megatron's column and row parallel linear layers, or classes of theirs."""

FEW_TOKENS = 64
"""Of a step of generation that goes to its experts without a dispatcher."""


class ExpertParallelMLP(nn.Module):
    """The MLP of a mixture-of-experts layer, as Megatron's TransformerLayer calls it.

    Args:
        config: Megatron's TransformerConfig, for dtype, hidden size and where to make weights.
        moe, kernel, groups, swiglu, router: ours, handed through ModuleSpec(params=...).
        recompute: parallel.recompute=moe, see the table above.
        linear: the classes of the shared experts' two linear layers.
        _: what Megatron hands every MLP since 0.18 (pg_collection, is_mtp_layer, name); ours has `groups` instead.
    """

    def __init__(
        self, config: Any, moe: MoEConfig, kernel: ExpertKernel, groups: ProcessGroups, *, recompute: bool = False,
        linear: Linear = (ColumnParallelLinear, RowParallelLinear), swiglu: SwiGluKernel = SwiGluKernel.auto,
        router: FusedKernel = FusedKernel.torch, **_: Any,
    ):  # fmt: skip
        super().__init__()
        hidden_size, num_local = config.hidden_size, moe.num_experts // groups.ep.size()
        ffn = moe.ffn_hidden_size // groups.etp.size()
        device = None if config.use_cpu_initialization else groups.device
        made = {"dtype": config.params_dtype, "device": device}

        def weight(*shape: int) -> nn.Parameter:  # model.parameters marks how each is reduced and fills it
            return nn.Parameter(torch.empty(*shape, **made))

        on_gpu = groups.device.type == "cuda"
        self.router = build_router(
            weight(moe.num_experts, hidden_size), moe, fused=router.is_triton(on_gpu=on_gpu)
        )  # fmt: skip
        kernel = kernel_for(kernel, groups.device, config.params_dtype)
        self.experts = Experts(
            weight(num_local, 2 * ffn, hidden_size), weight(num_local, hidden_size, ffn), kernel, groups.etp,
            swiglu_kernel(swiglu, on_gpu=on_gpu, experts=kernel),
        )  # fmt: skip
        self.dispatcher = Dispatcher(groups.ep, groups.etp, moe.num_experts, self.experts.want_aligned)
        # Grouped kernels do not wait for the number of each expert's rows, which a loop over experts must know.
        self.has_all_experts = groups.ep.size() * groups.etp.size() == 1 and kernel is ExpertKernel.per_expert
        self.recompute = recompute
        shared = moe.shared_expert_ffn_hidden_size
        self.shared_experts = build_shared_experts(config, shared, groups, linear) if shared else None
        self.moe = moe
        self.pool = TokenPool(groups)
        self.statistics = RoutingStatistics(moe.num_experts)
        self.auxiliary_scale = 0.0
        """What the training step sets: 1 / micro-batches of the global batch, so that losses are their mean."""
        self.is_generating = False
        """What inference sets while it generates: no assignment is dropped, whatever the capacity, no auxiliary loss is
        made and nothing is counted. Otherwise a token's output would depend on the other tokens of the pass."""

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        """hidden [S/tp, B, H] -> (output [S/tp, B, H], no bias).

        Args:
            padding_mask: [B, S/tp] int64, which token of the run stands where; below 0: padding, which no expert gets
                and nothing counts. None: no padding, and no noise to draw. The name is the one under which Megatron
                hands a tensor to every layer's MLP, through activation recompute too.
        """
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        token_id_T = None if padding_mask is None else padding_mask.t().reshape(-1)
        real_T = None if token_id_T is None else token_id_T >= 0
        routing = self.router(x_TH, token_id_T)
        keep = self._kept(routing, real_T, hidden.shape[1])
        may_be_short = self.is_generating and self.has_all_experts and not self.experts.adapter_scale
        if may_be_short and keep is None and len(x_TH) <= FEW_TOKENS:
            output_TKH = self.experts.of_few_tokens(x_TH, routing.expert_index, routing.weight)
            # A tensor of its own: Megatron would copy a view of another.
            output = output_TKH.view(*hidden.shape[:-1], *output_TKH.shape[1:]).sum(dim=-2)
            return self._with_shared(output, hidden), None
        # While the numbers of the plan are on their way to the host, the losses are work for the GPU.
        load = None if self.is_generating else load_of(routing, real_T, self.moe.num_experts)
        plan = self.dispatcher.plan(routing.expert_index, keep, None if load is None else load[0])
        loss = None if load is None else self._losses(routing, real_T, keep, load, hidden.shape[1])
        # A bound method that the layer kept would keep the layer, and its weights, after the model is gone.
        run_experts = recomputed(self._through_experts) if self.recompute else self._through_experts
        output = self.dispatcher.combine(run_experts(x_TH, routing.weight, plan), plan)
        if loss is not None and torch.is_grad_enabled():
            output = AttachLoss.apply(output, loss, self.auxiliary_scale)
        return self._with_shared(output.view_as(hidden), hidden), None

    def _with_shared(self, output: Tensor, hidden: Tensor) -> Tensor:
        return output if self.shared_experts is None else output + self.shared_experts(hidden)[0]

    def _through_experts(self, x_TH: Tensor, weight_TK: Tensor, plan: Plan) -> Tensor:
        """To the experts and through them; not the way back, which keeps no rows and would be sent once more."""
        arrived = self.dispatcher.send(x_TH, weight_TK, plan)
        return self.experts(arrived.rows, arrived.weight, arrived.of_experts)

    def _kept(self, routing: Routing, real_T: Tensor | None, batch: int) -> Tensor | None:
        """[T, K] bool: which assignments are sent; None: all."""
        factor, index = self.moe.router.capacity_factor, routing.expert_index
        if factor is None or self.is_generating:
            return None if real_T is None else real_T.unsqueeze(1).expand_as(index)
        chance = routing.probability.detach().gather(1, index)
        if real_T is not None:
            index = index.masked_fill(~real_T.unsqueeze(1), self.moe.num_experts)
        return kept_of_rank(
            index, chance, num_experts=self.moe.num_experts, factor=factor, policy=self.moe.router.drop_policy,
            pool=self.pool, batch=batch,
        )  # fmt: skip

    def _losses(self, routing: Routing, real_T: Tensor | None, keep: Tensor | None, load: Tensor, batch: int) -> Tensor:
        """The sum of the auxiliary losses; adds the routing to the statistics."""
        losses = auxiliary_losses(
            routing, real_T, load=load, settings=self.moe.router, load_share=self.router.load_share, pool=self.pool,
            batch=batch,
        )  # fmt: skip
        if not is_second_forward():  # counted in the first
            with torch.no_grad():
                self.statistics.add(
                    RoutedBatch(routing=routing, load=load[0], keep=keep, real_T=real_T, losses=losses,
                                pool_size=self.pool.size)
                )  # fmt: skip
        return losses[0] + losses[1]


def recomputed(function: Callable[..., T]) -> Callable[..., T]:
    """`function`, of which only the arguments are kept for the backward pass; that calls it again.

    Its collectives then run once more, in the order of the backward pass: the same on every rank of a group.
    """
    # Nothing random happens between a token and its experts, so no random state is kept.
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


def is_second_forward() -> bool:
    """Whether this forward pass repeats an earlier one, for the backward pass of Megatron's full recompute.

    Megatron runs a layer's first forward pass without gradients there, so that only the second one has them.
    """
    return is_checkpointing() and torch.is_grad_enabled()


def build_shared_experts(config: Any, ffn_hidden_size: int, groups: ProcessGroups, linear: Linear) -> MLP:
    """The shared experts: a dense SwiGLU that every token goes through (DeepSeekMoE, arXiv:2401.06066).

        hidden [S/tp, B, H] --gather over tp--> [S, B, H] -> SwiGLU, ffn cut over tp --reduce-scatter--> [S/tp, B, H]

    Several of one width are one SwiGLU of their widths together. Megatron's MLP, tensor parallel with sequence
    parallelism.

    Args:
        config: Megatron's TransformerConfig, with gated SwiGLU and no biases.
    """
    parts = MLPSubmodules(linear_fc1=linear[0], linear_fc2=linear[1])
    # MLP takes the first matrix's width from its argument but the second's from its config (megatron-core 0.16.1,
    # 0.19.2).
    config = copy(config)
    config.ffn_hidden_size = ffn_hidden_size
    return MLP(config, parts, ffn_hidden_size=ffn_hidden_size, tp_group=groups.tp)
