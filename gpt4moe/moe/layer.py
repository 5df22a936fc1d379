"""ExpertParallelMLP: router, dispatch and experts behind Megatron's MLP seam.

    hidden [S/tp, B, H] -> Router [T, E] -> Dispatcher.send -> Experts [N, H] -> Dispatcher.combine -> [S/tp, B, H]

Under sequence parallelism every tensor-parallel rank holds other tokens, so experts may be spread over the same ranks
("parallel folding"), whole (ep) or each cut over its ffn (etp). What a router pools is one micro-batch, gathered over
tp x cp.
"""

from typing import Any

import torch
from deepspeed.moe.ep_count import count_tokens_per_expert
from torch import Tensor, nn

from gpt4moe.config.moe import MoEConfig
from gpt4moe.config.training import ExpertKernel
from gpt4moe.moe.capacity import kept_of_rank
from gpt4moe.moe.dispatch import Dispatcher, Plan
from gpt4moe.moe.experts import Experts, kernel_for
from gpt4moe.moe.losses import AttachLoss, PoolSum, load_balancing_loss, z_loss_sum
from gpt4moe.moe.recompute import is_second_forward, recomputed
from gpt4moe.moe.router import Router, Routing
from gpt4moe.moe.statistics import RoutingStatistics
from gpt4moe.parallel.groups import ProcessGroups


class ExpertParallelMLP(nn.Module):
    """The MLP of a mixture-of-experts layer, as Megatron's TransformerLayer calls it.

    Args:
        config: Megatron's TransformerConfig, for dtype, hidden size and where to make weights.
        moe, kernel, groups: ours, handed through ModuleSpec(params=...).
        recompute: keep no rows of the experts for the backward pass, but send and compute them again (moe.recompute).
    """

    def __init__(
        self, config: Any, moe: MoEConfig, kernel: ExpertKernel, groups: ProcessGroups, *, recompute: bool = False
    ):
        super().__init__()
        hidden_size, num_local = config.hidden_size, moe.num_experts // groups.ep.size()
        ffn = moe.ffn_hidden_size // groups.etp.size()
        device = None if config.use_cpu_initialization else groups.device
        made = {"dtype": config.params_dtype, "device": device}

        def weight(*shape: int) -> nn.Parameter:  # model.parameters marks how each is reduced and fills it
            return nn.Parameter(torch.empty(*shape, **made))

        self.router = Router(weight(moe.num_experts, hidden_size), moe.router.kind, moe.top_k)
        kernel = kernel_for(kernel, groups.device, config.params_dtype)
        self.experts = Experts(weight(num_local, 2 * ffn, hidden_size), weight(num_local, hidden_size, ffn), kernel)
        self.dispatcher = Dispatcher(groups.ep, groups.etp, moe.num_experts, padded=kernel is ExpertKernel.grouped_mm)
        self.run_experts = recomputed(self._through_experts) if recompute else self._through_experts
        self.moe = moe
        self.pool = groups.tp_cp
        self.statistics = RoutingStatistics(moe.num_experts)
        self.auxiliary_scale = 0.0
        """What the training step sets: 1 / micro-batches of the global batch, so that losses are their mean."""

    def forward(self, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        """hidden [S/tp, B, H] -> (output [S/tp, B, H], no bias)."""
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        routing = self.router(x_TH)
        keep = self._kept(routing)
        plan = self.dispatcher.plan(routing.expert_index, keep)
        output = self.run_experts(x_TH, routing.weight, plan)
        output = self._with_losses(output, routing, keep)
        return output.view_as(hidden), None

    def _through_experts(self, x_TH: Tensor, weight_TK: Tensor, plan: Plan) -> Tensor:
        arrived = self.dispatcher.send(x_TH, weight_TK, plan)
        y_NH = self.experts(arrived.rows, arrived.weight, arrived.counts)
        return self.dispatcher.combine(y_NH, arrived, plan)

    def _kept(self, routing: Routing) -> Tensor | None:
        factor = self.moe.router.capacity_factor
        if factor is None:
            return None
        chance = routing.probability.detach().gather(1, routing.expert_index)
        return kept_of_rank(
            routing.expert_index, chance, num_experts=self.moe.num_experts, factor=factor,
            policy=self.moe.router.drop_policy, pool=self.pool,
        )  # fmt: skip

    def _with_losses(self, output: Tensor, routing: Routing, keep: Tensor | None) -> Tensor:
        """Attaches the auxiliary losses to the output's backward pass and records the routing."""
        settings, ranks = self.moe.router, self.pool.size()
        num_tokens = routing.logits.shape[0] * ranks
        load = count_tokens_per_expert(routing.expert_index, self.moe.num_experts)
        # One all-reduce for everything pooled: probabilities, z-loss, and the (gradient-free) load.
        sums = torch.cat((routing.probability.sum(dim=0), z_loss_sum(routing.logits).view(1), load.float()))
        probability_sum, z_sum, assigned = PoolSum.apply(sums, self.pool).split((load.numel(), 1, load.numel()))
        balance = settings.load_balancing_coefficient * load_balancing_loss(probability_sum, assigned, num_tokens)
        z_loss = settings.z_loss_coefficient * (z_sum / num_tokens).squeeze(0)
        if torch.is_grad_enabled():
            output = AttachLoss.apply(output, balance + z_loss, self.auxiliary_scale)
        if is_second_forward():  # counted in the first
            return output
        dropped = 0 if keep is None else keep.numel() - keep.sum()
        self.statistics.add(
            load=load, dropped=dropped, probability=routing.probability.detach(), losses=(balance, z_loss),
            share=1 / ranks,
        )  # fmt: skip
        return output
