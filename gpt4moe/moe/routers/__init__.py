"""The table of routers, one kind a file: how logits become experts and weights.

base.py           Router (matrix, noise, fp32 buffers), Routing, Choice
topk.py           softmax, renormalised over the chosen (Mixtral)
switch.py         the best expert, weighted by its raw probability (Switch Transformer)
sigmoid_bias.py   sigmoid scores and a bias that balances the load (DeepSeek-V3)
group_limited.py  the same among a token's best groups of experts (DeepSeek-V3)
"""

from torch import nn

from gpt4moe.config.moe import MoEConfig, RouterKind
from gpt4moe.moe.routers.base import Router
from gpt4moe.moe.routers.group_limited import GroupLimited
from gpt4moe.moe.routers.sigmoid_bias import SigmoidBias
from gpt4moe.moe.routers.switch import Switch
from gpt4moe.moe.routers.topk import TopK

ROUTERS: dict[RouterKind, type[Router]] = {
    RouterKind.topk: TopK,
    RouterKind.switch: Switch,
    RouterKind.sigmoid_bias: SigmoidBias,
    RouterKind.group_limited: GroupLimited,
}
"""Kind -> its class. What each kind needs of the settings: config.moe.ROUTER_TRAITS."""


def build_router(weight: nn.Parameter, moe: MoEConfig) -> Router:
    """The router of a layer around its matrix [E, H]."""
    return ROUTERS[moe.router.kind](weight, moe)
