"""Dispatch: rows go to their experts' ranks and come back to their tokens, whichever way they travel."""

import gc
import weakref

import numpy as np
import pytest
import torch

from gpt4moe.config.kernels import ExpertKernel
from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks

E, K = 4, 2
Named = dict[str, np.ndarray]


@pytest.mark.parametrize("ranks", [1, 2])
def test_through_identity_experts_a_token_comes_back_times_the_sum_of_its_weights(ranks: int) -> None:
    assert max(run_ranks(ranks, _identity)) < 1e-6


def _identity(environment: Environment) -> float:
    from gpt4moe.moe.dispatch import Dispatcher
    from tests.moe.case import rank_groups, relative

    generator = torch.Generator().manual_seed(environment.rank)
    num_tokens = 10 + environment.rank  # ranks need not have equally many
    x, weight = torch.randn(num_tokens, 8, generator=generator), torch.rand(num_tokens, K, generator=generator)
    index = torch.rand(num_tokens, E, generator=generator).topk(K).indices
    with rank_groups(environment, ep=environment.world_size) as groups:
        dispatcher = Dispatcher(groups.ep, groups.etp, E, lambda rows: False)
        plan = dispatcher.plan(index, None)
        arrived = dispatcher.send(x, weight, plan)
        assert arrived.of_experts.counts.sum() == arrived.rows.shape[0]
        back = dispatcher.combine(arrived.rows * arrived.weight, plan)
    return relative(back, x * weight.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_plan_is_freed_when_nobody_has_it_before_python_looks_for_cycles(ranks: int) -> None:
    assert run_ranks(ranks, _freed) == [[True, True]] * ranks


def _freed(environment: Environment) -> list[bool]:
    from gpt4moe.moe.dispatch import Dispatcher
    from tests.moe.case import rank_groups

    freed = []
    x, weight = torch.ones(10, 8, requires_grad=True), torch.ones(10, K, requires_grad=True)
    index = torch.rand(10, E, generator=torch.Generator().manual_seed(0)).topk(K).indices
    with rank_groups(environment, ep=environment.world_size) as groups:
        for aligned in (False, True):
            dispatcher = Dispatcher(groups.ep, groups.etp, E, lambda rows, aligned=aligned: aligned)
            plan = dispatcher.plan(index, None)
            arrived = dispatcher.send(x, weight, plan)
            assert sum(arrived.of_experts.listed) == arrived.of_experts.counts.sum()
            dispatcher.combine(arrived.rows * arrived.weight, plan).sum().backward()
            order = weakref.ref(plan.order)
            gc.disable()
            del plan, arrived
            freed.append(order() is None)
            gc.enable()
    return freed


def test_weights_arrive_bit_for_bit_behind_bf16_rows_of_any_width() -> None:
    """An odd width puts a weight where no fp32 number may begin; 0 or 1 rows are contiguous even so."""
    assert run_ranks(1, _exchanged) == [""]


def _exchanged(environment: Environment) -> str:
    from gpt4moe.moe.dispatch import exchange
    from tests.moe.case import rank_groups

    with rank_groups(environment) as groups:
        for num_rows, width in ((rows, width) for rows in (0, 1, 5) for width in (7, 8)):
            x, weight = torch.randn(num_rows + 1, width).bfloat16(), torch.rand(num_rows, 1)
            index, splits = torch.arange(num_rows).flip(0), ([num_rows], [num_rows])
            rows, weights = exchange(x, index, weight, lambda splits=splits: splits, groups.ep)
            if weights is None or not (weights.equal(weight) and rows.equal(x[index])):
                return f"{num_rows} rows of {width}"
        with pytest.raises(AssertionError, match="fp32"):
            exchange(torch.rand(2, 8).double(), torch.arange(2), torch.rand(2, 1), lambda: ([2], [2]), groups.ep)
    return ""


def test_a_dropped_assignment_adds_nothing_and_gets_no_gradient() -> None:
    (result,) = run_ranks(1, _with_drops)
    assert result["output"] < 1e-6
    assert result["gradient of a token without experts"] == 0
    assert result["gradient of a dropped weight"] == 0
    assert result["gradient of a kept weight"] > 0


def _with_drops(environment: Environment) -> dict[str, float]:
    from gpt4moe.moe.dispatch import Dispatcher
    from tests.moe.case import rank_groups, relative

    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(6, 8, generator=generator), torch.rand(6, K, generator=generator)
    index = torch.rand(6, E, generator=generator).topk(K).indices
    keep = torch.tensor([[1, 1], [0, 0], [1, 0], [0, 1], [1, 1], [0, 1]]).bool()
    x.requires_grad_()
    weight.requires_grad_()
    with rank_groups(environment) as groups:
        dispatcher = Dispatcher(groups.ep, groups.etp, E, lambda rows: False)
        plan = dispatcher.plan(index, keep)
        arrived = dispatcher.send(x, weight, plan)
        back = dispatcher.combine(arrived.rows * arrived.weight, plan)
        (once,) = torch.autograd.grad(back.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            once.sum().backward()
        back.square().sum().backward()
    assert x.grad is not None and weight.grad is not None
    return {
        "output": relative(back.detach(), (x * (weight * keep).sum(dim=1, keepdim=True)).detach()),
        "gradient of a token without experts": float(x.grad[1].norm()),
        "gradient of a dropped weight": float(weight.grad[~keep].norm()),
        "gradient of a kept weight": float(weight.grad[keep].abs().min()),
    }


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("factor", [None, 0.75])
def test_rows_for_grouped_kernels_padded_or_not_give_the_same_output_and_gradients(
    ranks: int, factor: float | None
) -> None:
    plain = run_ranks(ranks, _layer, ExpertKernel.per_expert, False, factor)
    for padded in (True, False):
        found = run_ranks(ranks, _layer, ExpertKernel.grouped_mm, padded, factor)
        for wanted, got in zip(plain, found, strict=True):
            _assert_equal(got, wanted)


def test_one_expert_a_rank_needs_no_places_and_gives_the_same_output_and_gradients() -> None:
    plain = run_ranks(2, _layer, ExpertKernel.per_expert, False, None, False, 2)
    for wanted, got in zip(plain, run_ranks(2, _layer, ExpertKernel.grouped_mm, False, None, False, 2), strict=True):
        _assert_equal(got, wanted)


@pytest.mark.parametrize("starved", [False, True], ids=["spread", "one rank without rows"])
def test_experts_on_two_ranks_equal_experts_on_one(starved: bool) -> None:
    (one,) = run_ranks(1, _layer, ExpertKernel.per_expert, False, None, starved)
    two = run_ranks(2, _layer, ExpertKernel.per_expert, False, None, starved)
    together = {name: np.concatenate([rank[name] for rank in two]) for name in one}
    together["router"] = two[0]["router"] + two[1]["router"]  # each saw its own tokens
    _assert_equal(together, one)
    assert starved == (not two[1]["gate_up"].any())


def _layer(
    environment: Environment, kernel: ExpertKernel, padded: bool, factor: float | None, starved: bool = False,
    num_experts: int = E,
) -> Named:  # fmt: skip
    """Output and gradients of this rank's share of the tokens (halves of the batch)."""
    from tests.moe.case import as_arrays, build_layer, moe_config, rank_groups, tokens

    with rank_groups(environment, ep=environment.world_size) as groups:
        moe = moe_config(num_experts, K, load_balancing_coefficient=0.0, capacity_factor=factor)
        layer = build_layer(groups, moe, kernel, padded=padded)
        whole, gradient = tokens(2, 8)
        whole = whole.detach()
        if starved:  # positive inputs: experts 0 and 1 beat the zero logits of 2 and 3 for every token
            whole = whole.abs()
            with torch.no_grad():
                layer.router.weight[:2].abs_()
                layer.router.weight[2:] = 0.0
        split = environment.world_size
        hidden = whole.chunk(split)[environment.rank].requires_grad_()
        output, _ = layer(hidden)
        output.backward(gradient.chunk(split)[environment.rank])
        parameters = {"router": layer.router.weight, "gate_up": layer.experts.gate_up, "down": layer.experts.down}
        gradients = {name: leaf.grad for name, leaf in {"x": hidden, **parameters}.items()}
        return as_arrays({"output": output, **gradients})


def _assert_equal(got: Named, wanted: Named) -> None:
    for name, value in wanted.items():
        # fp32, sums of a few dozen terms in another order.
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
