"""Routers: which experts, with which weight, and what the router learns from."""

import dataclasses

import pytest
import torch
from torch import nn

from gpt4moe.config.moe import ROUTER_TRAITS, MoEConfig, RouterConfig, RouterKind
from gpt4moe.moe.routers import build_router
from gpt4moe.moe.routers.base import Router, Routing

T, H, E = 40, 8, 6


def _built(kind: RouterKind, top_k: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, Router]:
    weight = nn.Parameter(torch.randn(E, H, generator=torch.Generator().manual_seed(0)).to(dtype))
    settings = RouterConfig(kind=kind, bias_update_rate=0.5)
    if kind is RouterKind.group_limited:
        settings.num_groups, settings.group_topk = 3, 1
    moe = MoEConfig(num_experts=E, ffn_hidden_size=1, top_k=top_k, router=settings)
    return weight, build_router(weight, moe)


def _routed(
    kind: RouterKind, top_k: int, dtype: torch.dtype = torch.float32, bias: list[float] | None = None
) -> tuple[nn.Parameter, Routing]:
    weight, router = _built(kind, top_k, dtype)
    if bias is not None:
        router.bias.copy_(torch.tensor(bias))
    return weight, router(torch.randn(T, H, generator=torch.Generator().manual_seed(1)).to(dtype))


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


def test_a_bias_changes_who_is_chosen_but_no_weight_of_the_same_choice() -> None:
    _, before = _routed(RouterKind.sigmoid_bias, 2)
    _, after = _routed(RouterKind.sigmoid_bias, 2, bias=[0.0, 0.0, 0.0, 0.3, 0.0, 0.0])
    same = (before.expert_index.sort(dim=1).values == after.expert_index.sort(dim=1).values).all(dim=1)
    assert 0 < same.sum() < T and torch.equal(before.probability, after.probability)
    assert torch.equal(before.preferred_index, after.preferred_index)
    order = [routing.expert_index.argsort(dim=1) for routing in (before, after)]
    weights = [r.weight.gather(1, o)[same] for r, o in zip((before, after), order, strict=True)]
    torch.testing.assert_close(*weights, rtol=1e-6, atol=0)


def test_a_bias_rises_where_the_load_is_below_the_mean_and_stays_where_it_is_the_mean() -> None:
    _, router = _built(RouterKind.sigmoid_bias, 2)
    router.finish_step(torch.tensor([9.0, 3.0, 0.0, 12.0, 6.0, 6.0], dtype=torch.float64))
    assert torch.equal(router.bias, torch.tensor([-0.5, 0.5, 0.5, -0.5, 0.0, 0.0]))


def test_a_group_limited_token_stays_within_its_best_groups() -> None:
    _, routing = _routed(RouterKind.group_limited, 2)
    score = routing.logits.sigmoid().view(T, 3, 2)
    best = score.sum(dim=-1).argmax(dim=-1)  # groups of two: the sum of the two best is the sum
    assert torch.equal(routing.expert_index // 2, best.unsqueeze(1).expand(T, 2))
    unlimited = routing.logits.topk(2).indices // 2
    assert (unlimited != best.unsqueeze(1)).any(), "the limit must have been felt"


def test_a_cast_of_the_model_leaves_the_bias_in_fp32() -> None:
    _, router = _built(RouterKind.sigmoid_bias, 2)
    assert router.to(torch.bfloat16).bias.dtype is torch.float32 and router.weight.dtype is torch.bfloat16


def test_a_single_renormalised_weight_would_teach_the_router_nothing() -> None:
    weight, routing = _routed(RouterKind.topk, 1)
    routing.weight.square().sum().backward()
    assert weight.grad is not None and weight.grad.norm() < 1e-5


@pytest.mark.parametrize("kind", RouterKind)
def test_a_router_is_what_its_kind_declares(kind: RouterKind) -> None:
    traits = ROUTER_TRAITS[kind]
    _, router = _built(kind, traits.fixed_top_k or 2)
    assert {name: buffer.tolist() for name, buffer in router.named_buffers()} == {
        buffer.name: [buffer.start(E)] * E for buffer in traits.buffers
    }
    _, routing = _routed(kind, traits.fixed_top_k or 2)
    is_renormalised = bool((routing.weight.sum(dim=1) - 1).abs().max() < 1e-6)  # a few fp32 roundings
    assert is_renormalised == traits.is_renormalised


@pytest.mark.parametrize("kind", RouterKind)
def test_routing_under_bf16_weights_is_to_the_bit_what_it_is_in_fp32(kind: RouterKind) -> None:
    """Of the same numbers, which bf16 can say: what is rounded to bf16 on the way, if only the logits, differs."""
    top_k = 1 if kind is RouterKind.switch else 2
    weight, router = _built(kind, top_k, torch.bfloat16)
    exact_weight, exact = _built(kind, top_k)
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        exact_weight.copy_(weight)
    in_bf16, in_fp32 = router(x), exact(x.float())
    assert in_bf16.sums is in_fp32.sums is None, "made by a kernel alone"
    for field in dataclasses.fields(Routing):
        if field.name == "sums":
            continue
        got, want = getattr(in_bf16, field.name), getattr(in_fp32, field.name)
        assert got.dtype is want.dtype and torch.equal(got, want), field.name
    assert not torch.equal(in_fp32.logits, in_fp32.logits.bfloat16().float()), "bf16 must be able to show"
    for routing in (in_bf16, in_fp32):
        (routing.weight[:, 0].sum() + routing.logits.square().mean()).backward()
    assert weight.grad is not None and exact_weight.grad is not None
    assert torch.equal(weight.grad, exact_weight.grad.bfloat16()), "rounded once, at the end"


def test_the_margin_of_a_group_limited_router_counts_the_choice_of_groups_too() -> None:
    settings = RouterConfig(kind=RouterKind.group_limited, num_groups=2, group_topk=1)
    router = build_router(
        nn.Parameter(torch.zeros(4, H)), MoEConfig(num_experts=4, ffn_hidden_size=1, top_k=1, router=settings)
    )
    # Within its group the first expert is far ahead; the groups are nearly equal.
    score = torch.tensor([[0.9, 0.1, 0.5, 0.499]])
    assert router.choose(score.logit()).margin.item() == pytest.approx(0.001, abs=1e-6)
