"""A token chooses only among the experts of its best groups (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

    E experts = num_groups groups of neighbours;  a group's score = the sum of its two best s + b
    the group_topk best groups stay, the rest is -inf;  then as sigmoid_bias

With the groups of one node's experts, a token is sent to at most group_topk nodes.
"""

import torch
from torch import Tensor, nn

from gpt4moe.config.moe import MoEConfig
from gpt4moe.moe.routers.base import best
from gpt4moe.moe.routers.sigmoid_bias import SigmoidBias

_JUDGED_BY = 2
"""A group's score is the sum of this many of its best."""


class GroupLimited(SigmoidBias):
    def __init__(self, weight: nn.Parameter, moe: MoEConfig):
        super().__init__(weight, moe)
        assert moe.router.num_groups is not None and moe.router.group_topk is not None
        self.num_groups, self.group_topk = moe.router.num_groups, moe.router.group_topk

    def candidates(self, biased: Tensor) -> tuple[Tensor, Tensor]:
        by_group = biased.view(biased.shape[0], self.num_groups, -1)
        group_index, margin = best(by_group.topk(_JUDGED_BY, dim=-1).values.sum(dim=-1), self.group_topk)
        stays = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter_(1, group_index, True)
        near = margin if self.group_topk < self.num_groups else margin + torch.inf
        return by_group.masked_fill(~stays.unsqueeze(-1), -torch.inf).view_as(biased), near
