"""The table of routers: a kind of the config -> its class."""

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


def build_router(weight: nn.Parameter, moe: MoEConfig) -> Router:
    """The router of a layer around its matrix [E, H]."""
    return ROUTERS[moe.router.kind](weight, moe)
