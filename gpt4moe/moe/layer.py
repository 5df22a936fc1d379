"""ExpertParallelMLP: router, dispatch and experts behind Megatron's MLP seam.

    hidden [S/tp, B, H] -> Router [T, E] -> Dispatcher.send -> Experts [N, H] -> Dispatcher.combine -> [S/tp, B, H]
                      \\-> shared experts, where the model has them ----------------------------------> +

Under sequence parallelism every tensor-parallel rank holds other tokens, so experts may be spread over the same ranks
("parallel folding"), whole (ep) or each cut over its ffn (etp). What a router pools is one micro-batch, gathered over
tp x cp.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gpt4moe.config.moe import MoEConfig
from gpt4moe.config.training import ExpertKernel
from gpt4moe.moe.auxiliary import auxiliary_losses, count_assignments
from gpt4moe.moe.capacity import kept_of_rank
from gpt4moe.moe.dispatch import Arrived, Dispatcher, Plan
from gpt4moe.moe.experts import Experts, kernel_for
from gpt4moe.moe.losses import AttachLoss
from gpt4moe.moe.pool import Pool
from gpt4moe.moe.recompute import is_second_forward, recomputed
from gpt4moe.moe.router import build_router
from gpt4moe.moe.routers.base import Routing
from gpt4moe.moe.shared_experts import build_shared_experts
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

        self.router = build_router(weight(moe.num_experts, hidden_size), moe)
        kernel = kernel_for(kernel, groups.device, config.params_dtype)
        self.experts = Experts(weight(num_local, 2 * ffn, hidden_size), weight(num_local, hidden_size, ffn), kernel)
        self.dispatcher = Dispatcher(groups.ep, groups.etp, moe.num_experts, padded=kernel is ExpertKernel.grouped_mm)
        self.run_experts = recomputed(self._through_experts) if recompute else self._through_experts
        shared = moe.shared_expert_ffn_hidden_size
        self.shared_experts = build_shared_experts(config, shared, groups) if shared else None
        self.moe = moe
        self.pool = Pool(groups)
        self.statistics = RoutingStatistics(moe.num_experts)
        self.auxiliary_scale = 0.0
        """What the training step sets: 1 / micro-batches of the global batch, so that losses are their mean."""

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
        plan = self.dispatcher.plan(routing.expert_index, keep)
        output = self.dispatcher.combine(*self.run_experts(x_TH, routing.weight, plan), plan)
        output = self._with_losses(output, routing, real_T, keep, hidden.shape[1]).view_as(hidden)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden)[0]
        return output, None

    def _through_experts(self, x_TH: Tensor, weight_TK: Tensor, plan: Plan) -> tuple[Tensor, Arrived]:
        """To the experts and through them; not the way back, which keeps no rows and would be sent once more."""
        arrived = self.dispatcher.send(x_TH, weight_TK, plan)
        return self.experts(arrived.rows, arrived.weight, arrived.counts), arrived

    def _kept(self, routing: Routing, real_T: Tensor | None, batch: int) -> Tensor | None:
        """[T, K] bool: which assignments are sent; None: all."""
        factor, index = self.moe.router.capacity_factor, routing.expert_index
        if factor is None:
            return None if real_T is None else real_T.unsqueeze(1).expand_as(index)
        chance = routing.probability.detach().gather(1, index)
        if real_T is not None:
            index = index.masked_fill(~real_T.unsqueeze(1), self.moe.num_experts)
        return kept_of_rank(
            index, chance, num_experts=self.moe.num_experts, factor=factor, policy=self.moe.router.drop_policy,
            pool=self.pool, batch=batch,
        )  # fmt: skip

    def _with_losses(
        self, output: Tensor, routing: Routing, real_T: Tensor | None, keep: Tensor | None, batch: int
    ) -> Tensor:
        """Attaches the auxiliary losses to the output's backward pass and records the routing."""
        losses = auxiliary_losses(
            routing, real_T, settings=self.moe.router, load_share=self.router.load_share, pool=self.pool, batch=batch
        )
        if torch.is_grad_enabled():
            output = AttachLoss.apply(output, losses[0] + losses[1], self.auxiliary_scale)
        if not is_second_forward():  # counted in the first
            self._record(routing, real_T, keep, losses)
        return output

    @torch.no_grad()
    def _record(
        self, routing: Routing, real_T: Tensor | None, keep: Tensor | None, losses: tuple[Tensor, Tensor]
    ) -> None:
        load = count_assignments(routing.expert_index, real_T, self.moe.num_experts)[0]
        entropy, margin = torch.special.entr(routing.probability).sum(dim=1), routing.margin
        if real_T is not None:
            entropy, margin = entropy * real_T, margin * real_T
        self.statistics.add(
            load=load, dropped=0 if keep is None else load.sum() - keep.sum(), entropy=entropy.sum(),
            margin=margin.sum(dtype=torch.float64), losses=losses, share=1 / self.pool.size,
        )  # fmt: skip
