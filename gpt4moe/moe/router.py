"""The router: one matrix, fp32 arithmetic, and a rule that turns logits into experts and weights.

Shapes: T tokens of this rank, H hidden, E experts of the layer over all ranks, K experts a token goes to.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpt4moe.config.moe import RouterKind


@dataclass(frozen=True, slots=True)
class Routing:
    """Where the tokens of one rank go."""

    logits: Tensor
    """[T, E] fp32."""
    probability: Tensor
    """[T, E] fp32, softmax of the logits; auxiliary losses flow through it."""
    expert_index: Tensor
    """[T, K] int64."""
    weight: Tensor
    """[T, K] fp32, what an expert's output is multiplied by."""


def choose_topk(probability: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K most probable experts, weights renormalised to sum 1 (Mixtral, arXiv:2401.04088, section 2.1).

    Equal to a softmax over the chosen logits. Returns: expert_index [T, K], weight [T, K].
    """
    chosen, expert_index = torch.topk(probability, top_k, dim=-1)
    return expert_index, chosen / chosen.sum(dim=-1, keepdim=True)


def choose_switch(probability: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The most probable expert, weighted by its raw probability (Switch Transformer, arXiv:2101.03961, equation 2).

    Renormalised, the weight would always be 1 and the language-model loss would not reach the router.
    Returns: expert_index [T, 1], weight [T, 1].
    """
    assert top_k == 1
    weight, expert_index = probability.max(dim=-1, keepdim=True)
    return expert_index, weight


ROUTERS: dict[RouterKind, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    RouterKind.topk: choose_topk,
    RouterKind.switch: choose_switch,
}


class Router(nn.Module):
    """Owns the routing matrix [E, H]; stored in the model's dtype, multiplied in fp32."""

    def __init__(self, weight: nn.Parameter, kind: RouterKind, top_k: int):
        super().__init__()
        self.weight = weight
        self.choose = ROUTERS[kind]
        self.top_k = top_k

    def forward(self, x_TH: Tensor) -> Routing:
        logits = torch.nn.functional.linear(x_TH.float(), self.weight.float())
        probability = torch.softmax(logits, dim=-1)
        expert_index, weight = self.choose(probability, self.top_k)
        return Routing(logits, probability, expert_index, weight)
