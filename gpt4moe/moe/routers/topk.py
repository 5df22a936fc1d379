"""Softmax, the K most probable experts, renormalised (Mixtral, arXiv:2401.04088, section 2.1)."""

import torch
from torch import Tensor

from gpt4moe.moe.routers.base import Choice, Router, best


class TopK(Router):
    """weight_k = p_k / (sum of the chosen p), computed as a softmax over the chosen logits."""

    def choose(self, logits: Tensor) -> Choice:
        probability = torch.softmax(logits, dim=-1)
        expert_index, margin = best(probability, self.top_k)
        weight = torch.softmax(logits.gather(1, expert_index), dim=-1)
        return Choice(probability, expert_index, weight, expert_index, margin)
