"""ExpertParallelMLP: what beside its output it says and does. Its output is compared in tests/parity."""

from math import log
from typing import Any

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
