"""The most probable expert alone (Switch Transformer, arXiv:2101.03961, equation 2)."""

import torch
from torch import Tensor

from gpt4moe.moe.routers.base import Choice, Router, best


class Switch(Router):
    """weight = p of the one expert. Renormalised, it would always be 1, and the language model's loss would not reach
    the router."""

    def choose(self, logits: Tensor) -> Choice:
        assert self.top_k == 1
        probability = torch.softmax(logits, dim=-1)
        expert_index, margin = best(probability, 1)
        return Choice(probability, expert_index, probability.gather(1, expert_index), expert_index, margin)
