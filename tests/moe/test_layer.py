"""ExpertParallelMLP: what beside its output it says and does. Its output is compared in tests/parity."""

from math import log
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks

E, K, S, B = 4, 2, 6, 2


@pytest.fixture(scope="module")
def ran() -> dict[str, Any]:
    return run_ranks(1, _run)[0]


def _run(environment: Environment) -> dict[str, Any]:
    from tests.moe.case import as_arrays, build_layer, moe_config, rank_groups, tokens

    with rank_groups(environment) as groups:
        hidden, gradient = tokens(S, B)
        result: dict[str, Any] = {}
        cases = (("plain", 0.0, None), ("losses", 0.5, None), ("drops", 0.0, 0.5), ("generating", 0.5, 0.5))
        for name, coefficient, factor in cases:
            router = {"load_balancing_coefficient": coefficient, "capacity_factor": factor}
            layer = build_layer(groups, moe_config(E, K, **router))
            layer.is_generating = name == "generating"
            layer.has_all_experts = False  # so few tokens would take a shorter way
            empty = layer.statistics.read(groups.device)
            layer.auxiliary_scale = 0.25
            hidden.grad = None
            output, bias = layer(hidden)
            output.backward(gradient)
            read = {"statistics": layer.statistics.read(groups.device), "empty": empty}
            result[name] = as_arrays({"output": output, "router": layer.router.weight.grad, **read}) | {"bias": bias}
        with torch.no_grad():
            layer = build_layer(groups, moe_config(E, K))
            layer.router.weight.zero_()
            layer.eval()
            layer(hidden)
            layer(hidden)
            result["undecided"] = layer.statistics.read(groups.device).numpy()
        return result


def test_output_has_the_shape_of_the_input_and_no_bias(ran: dict[str, Any]) -> None:
    assert ran["plain"]["output"].shape == (S, B, 16) and ran["plain"]["bias"] is None


def test_auxiliary_losses_change_the_routers_gradient_but_not_the_output(ran: dict[str, Any]) -> None:
    assert np.array_equal(ran["losses"]["output"], ran["plain"]["output"])
    assert np.linalg.norm(ran["losses"]["router"] - ran["plain"]["router"]) > 1e-4


def test_a_generating_layer_drops_nothing_makes_no_losses_and_counts_nothing(ran: dict[str, Any]) -> None:
    for name in ("output", "router"):
        assert np.array_equal(ran["generating"][name], ran["plain"][name])
    assert np.array_equal(ran["generating"]["statistics"], ran["generating"]["empty"])


def test_load_counts_every_assignment_before_drops(ran: dict[str, Any]) -> None:
    for name in ("plain", "drops"):
        assert ran[name]["statistics"][:E].sum() == S * B * K


def test_dropped_assignments_are_counted(ran: dict[str, Any]) -> None:
    load = ran["drops"]["statistics"][:E]
    slots = 3  # ceil(0.5 * 12 tokens * 2 / 4)
    assert ran["drops"]["statistics"][E] == (load - slots).clip(0).sum() > 0
    assert ran["plain"]["statistics"][E] == 0


def test_an_undecided_router_has_the_entropy_of_a_uniform_choice(ran: dict[str, Any]) -> None:
    assert ran["undecided"][E + 1].item() == pytest.approx(2 * S * B * log(E), rel=1e-6)  # two micro-batches


def test_a_layer_that_saw_nothing_reports_zeros(ran: dict[str, Any]) -> None:
    assert ran["plain"]["empty"].shape == (E + 5,) and not ran["plain"]["empty"].any()


FEW = {
    # name -> kind of router, top_k, width of shared experts, S, B
    "one token": ("topk", 2, 0, 1, 1),
    "as many as go the short way": ("topk", 2, 0, 32, 2),
    "switch": ("switch", 1, 0, 12, 1),
    "a bias, shared experts": ("sigmoid_bias", 2, 20, 6, 2),
    "shared experts, one too many": ("topk", 2, 20, 13, 5),
}


@pytest.fixture(scope="module")
def of_few() -> dict[str, Any]:
    return run_ranks(1, _of_few)[0]


def _of_few(environment: Environment) -> dict[str, Any]:
    """Of a layer whose capacity is too small: the output as it generates, on the way that it chooses and by the
    dispatcher; that of the same layer without a capacity, which does not generate; how often the short way was taken;
    statistics before and after."""
    from gpt4moe.config.moe import RouterKind
    from tests.moe.case import as_arrays, build_layer, moe_config, rank_groups, tokens
    from tests.parity.megatron_layer import megatron_config

    found: dict[str, Any] = {}
    with rank_groups(environment) as groups:
        for name, (kind, top_k, shared, length, batch) in FEW.items():
            moe = moe_config(E, top_k, kind=RouterKind(kind), capacity_factor=0.25)
            moe.shared_expert_ffn_hidden_size = shared or None
            layer = build_layer(groups, moe, config=megatron_config(E, K))
            generator = torch.Generator().manual_seed(5)
            for part in () if layer.shared_experts is None else layer.shared_experts.parameters():
                part.data.copy_(torch.randn(part.shape, generator=generator) / part.shape[1] ** 0.5)
            layer.experts.of_few_tokens = few = Mock(wraps=layer.experts.of_few_tokens)
            hidden = tokens(length, batch)[0]
            with torch.no_grad():
                dropping = layer(hidden)[0]
                before = layer.statistics.read(groups.device)
                layer.is_generating = True
                output, _ = layer(hidden)
                after, taken = layer.statistics.read(groups.device), few.call_count
                layer.has_all_experts = False
                dispatched, _ = layer(hidden)
                layer.is_generating, moe.router.capacity_factor = False, None
                whole, _ = layer(hidden)
                layer.is_generating, layer.has_all_experts = True, True
                padded, _ = layer(hidden, padding_mask=torch.arange(length * batch).view(batch, length))
                layer.experts.adapter_scale = 1.0
                adapted, _ = layer(hidden)
            assert few.call_count == taken, "what does not generate, may have padding or has adapters goes the long way"
            torch.testing.assert_close(padded, dispatched)
            torch.testing.assert_close(adapted, dispatched)
            found[name] = as_arrays({
                "output": output, "dispatched": dispatched, "whole": whole, "dropping": dropping, "before": before,
                "after": after,
            }) | {"taken": taken}  # fmt: skip
    return found


@pytest.mark.parametrize("name", FEW)
def test_few_tokens_that_a_layer_generates_get_on_a_shorter_way_what_the_dispatcher_gives(
    of_few: dict[str, Any], name: str
) -> None:
    found = of_few[name]
    _, _, _, length, batch = FEW[name]
    assert found["taken"] == (length * batch <= 64)
    for other in ("dispatched", "whole"):  # sums of fp32 in another order
        np.testing.assert_allclose(found["output"], found[other], rtol=1e-5, atol=1e-6)
    assert np.array_equal(found["after"], found["before"]) and found["before"][:E].sum() > 0
    assert (np.abs(found["dropping"] - found["whole"]).max() > 0.01) == (length * batch > 1)  # the capacity bites
