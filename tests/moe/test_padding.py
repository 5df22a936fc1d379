"""Padding: a batch with it is the batch without it, in everything a layer computes, learns and counts."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks

E, S, REAL, B, REAL_B = 4, 8, 6, 3, 2
# Two sequences of six tokens; padded, each ends in two positions that are none, and a third sequence is none at all.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "drops by probability": {"capacity_factor": 0.6},
    "drops by position": {"capacity_factor": 0.6, "drop_policy": "position"},
    "per sequence": {"load_balancing_scope": "sequence"},
    "global batch": {"load_balancing_scope": "global_batch"},
    "sigmoid_bias": {"kind": "sigmoid_bias", "load_balancing_scope": "sequence"},
    "switch": {"kind": "switch", "capacity_factor": 0.6, "drop_policy": "position"},
}


@cache
def ran(padded: bool, world_size: int) -> list[dict[str, Any]]:
    return run_ranks(world_size, _run, padded)


def _run(environment: Environment, padded: bool) -> dict[str, Any]:
    from gpt4moe.config.moe import DropPolicy, LoadBalancingScope, RouterKind
    from tests.moe.case import as_arrays, build_layer, moe_config, rank_groups, tokens

    enums = {"kind": RouterKind, "drop_policy": DropPolicy, "load_balancing_scope": LoadBalancingScope}
    size = environment.world_size
    answer: dict[str, Any] = {}
    with rank_groups(environment, tp=size, ep=size) as groups:
        for name, settings in CASES.items():
            typed = {key: enums[key](value) if key in enums else value for key, value in settings.items()}
            top_k = 1 if settings.get("kind") == "switch" else 2
            layer = build_layer(
                groups, moe_config(E, top_k, load_balancing_coefficient=3.0, z_loss_coefficient=0.2, **typed)
            )
            layer.auxiliary_scale = 1.0
            hidden, gradient = (whole.detach() for whole in tokens(S, B))
            number = torch.arange(B * S).view(B, S)
            number[:, REAL:], number[REAL_B:] = -1, -1
            if not padded:
                hidden, gradient, number = hidden[:REAL, :REAL_B], gradient[:REAL, :REAL_B], number[:REAL_B, :REAL]
            at = environment.rank
            hidden, gradient = (whole.chunk(size)[at].clone() for whole in (hidden, gradient))
            hidden.requires_grad_()
            mask = number.chunk(size, dim=1)[at] if padded else None
            output, _ = layer(hidden, padding_mask=mask)
            output.backward(gradient)
            answer[name] = as_arrays({
                "output": output, "input": hidden.grad, "statistics": layer.statistics.read(groups.device),
                "router": layer.router.weight.grad, "gate_up": layer.experts.gate_up.grad,
                "down": layer.experts.down.grad,
            })  # fmt: skip
    return answer


def whole(parts: list[dict[str, Any]], name: str) -> dict[str, np.ndarray]:
    """Of all ranks: rows and experts side by side, what each has a part of summed."""
    each = [part[name] for part in parts]
    side_by_side = {key: np.concatenate([part[key] for part in each]) for key in ("output", "input", "gate_up", "down")}
    return side_by_side | {key: sum(part[key] for part in each) for key in ("router", "statistics")}


@pytest.mark.parametrize("world_size", [1, 2], ids=["one rank", "tp2-ep2"])
@pytest.mark.parametrize("name", CASES)
def test_a_padded_batch_is_the_batch_without_padding(name: str, world_size: int) -> None:
    got, want = whole(ran(True, world_size), name), whole(ran(False, 1), name)
    for key in ("output", "input"):
        # fp32: the same rows in products of another height.
        np.testing.assert_allclose(got[key][:REAL, :REAL_B], want[key], rtol=1e-4, atol=1e-6, err_msg=key)
        assert not got[key][REAL:].any() and not got[key][:, REAL_B:].any(), "padding comes out as zero"
    for key in ("router", "gate_up", "down"):
        assert np.linalg.norm(got[key] - want[key]) < 2e-6 * np.linalg.norm(want[key]), key
    # Loads, drops; sums of entropy, margin, losses.
    np.testing.assert_array_equal(got["statistics"][: E + 1], want["statistics"][: E + 1])
    np.testing.assert_allclose(got["statistics"], want["statistics"], rtol=2e-6)
    assert want["statistics"][:E].sum() == REAL * REAL_B * (1 if name == "switch" else 2)
    assert (want["statistics"][E] > 0) == ("capacity_factor" in CASES[name])
