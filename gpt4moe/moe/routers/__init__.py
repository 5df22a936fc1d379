"""The table of routers, one kind a file: how logits become experts and weights.

base.py           Router (matrix, noise, fp32 buffers), Routing, Choice
topk.py           softmax, renormalised over the chosen (Mixtral)
switch.py         the best expert, weighted by its raw probability (Switch Transformer)
sigmoid_bias.py   sigmoid scores and a bias that balances the load (DeepSeek-V3)
softmax_choice.py  the choice of topk and switch and the sums of losses and statistics in one Triton kernel each way
softmax_kernels.py  that kernel
group_limited.py  the same among a token's best groups of experts (DeepSeek-V3)
"""

from functools import partial

from torch import nn

from gpt4moe.config.moe import MoEConfig, RouterKind
from gpt4moe.moe.routers.base import Router
from gpt4moe.moe.routers.group_limited import GroupLimited
from gpt4moe.moe.routers.sigmoid_bias import SigmoidBias
from gpt4moe.moe.routers.softmax_choice import chosen_by_kernel
from gpt4moe.moe.routers.switch import Switch
from gpt4moe.moe.routers.topk import TopK

ROUTERS: dict[RouterKind, type[Router]] = {
    RouterKind.topk: TopK,
    RouterKind.switch: Switch,
    RouterKind.sigmoid_bias: SigmoidBias,
    RouterKind.group_limited: GroupLimited,
}
"""Kind -> its class. What each kind needs of the settings: config.moe.ROUTER_TRAITS."""


_FUSABLE = (TopK, Switch)
"""Classes whose rule softmax_kernels has. Another class in the place of one of them keeps its own rule."""


def build_router(weight: nn.Parameter, moe: MoEConfig, *, fused: bool = False) -> Router:
    """The router of a layer around its matrix [E, H].

    Args:
        fused: chooses by a Triton kernel, where the settings allow it (RouterConfig.is_fusable).
    """
    router = ROUTERS[moe.router.kind](weight, moe)
    if fused and moe.router.is_fusable and type(router) in _FUSABLE:
        router.choose_fused = partial(
            chosen_by_kernel, top_k=moe.top_k, is_renormalised=moe.router.traits.is_renormalised
        )  # fmt: skip
    return router
