"""Softmax routers: which experts, with which weight, and what the router learns from."""

import torch
from torch import nn

from gpt4moe.config.moe import MoEConfig, RouterConfig, RouterKind
from gpt4moe.moe.router import build_router

T, H, E = 40, 8, 6


def _routed(kind: RouterKind, top_k: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(E, H, generator=generator).to(dtype))
    x = torch.randn(T, H, generator=generator).to(dtype)
    moe = MoEConfig(num_experts=E, ffn_hidden_size=1, top_k=top_k, router=RouterConfig(kind=kind))
    return weight, build_router(weight, moe)(x)


def test_topk_weights_are_a_softmax_over_the_chosen_logits() -> None:
    _, routing = _routed(RouterKind.topk, 2)
    chosen = routing.logits.gather(1, routing.expert_index)
    # Two ways to the same fp32 number: a few roundings apart.
    torch.testing.assert_close(routing.weight, chosen.softmax(dim=-1), rtol=1e-6, atol=1e-7)


def test_a_token_goes_to_the_experts_with_the_largest_logits() -> None:
    _, routing = _routed(RouterKind.topk, 3)
    largest = routing.logits.argsort(dim=-1, descending=True)[:, :3]
    assert torch.equal(routing.expert_index.sort(dim=-1).values, largest.sort(dim=-1).values)


def test_switch_weight_is_the_raw_probability_of_the_one_expert() -> None:
    _, routing = _routed(RouterKind.switch, 1)
    best = routing.logits.softmax(dim=-1).max(dim=-1, keepdim=True)
    assert torch.equal(routing.weight, best.values) and torch.equal(routing.expert_index, best.indices)
    assert (routing.weight < 1).all()


def test_the_language_model_loss_reaches_a_switch_router() -> None:
    weight, routing = _routed(RouterKind.switch, 1)
    routing.weight.square().sum().backward()
    assert weight.grad is not None and weight.grad.norm() > 1e-2


def test_a_single_renormalised_weight_would_teach_the_router_nothing() -> None:
    weight, routing = _routed(RouterKind.topk, 1)
    routing.weight.square().sum().backward()
    assert weight.grad is not None and weight.grad.norm() < 1e-5


def test_routing_is_computed_in_fp32_under_bf16_weights() -> None:
    weight, routing = _routed(RouterKind.topk, 2, torch.bfloat16)
    assert {routing.logits.dtype, routing.probability.dtype, routing.weight.dtype} == {torch.float32}
    routing.weight[:, 0].sum().backward()
    assert weight.grad is not None and weight.grad.dtype is torch.bfloat16
