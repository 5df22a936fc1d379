"""What the language model's loss teaches a router, against the papers' equations written out token by token in fp64."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt4moe.config.moe import RouterKind
from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks

E, S, B, GROUPS, SCALING = 6, 12, 2, 3, 2.5
BIAS = (0.3, -0.2, 0.1, 0.0, -0.3, 0.2)
TOP_K = {RouterKind.topk: 2, RouterKind.switch: 1, RouterKind.sigmoid_bias: 3, RouterKind.group_limited: 2}


@cache
def layers() -> dict[RouterKind, dict[str, np.ndarray]]:
    """Of each kind: a layer without auxiliary losses, what went through it, and the gradient of its router."""
    (answer,) = run_ranks(1, _run)
    return answer


def _run(environment: Environment) -> dict[RouterKind, Any]:
    from tests.moe.case import as_arrays, build_layer, moe_config, rank_groups, tokens

    answer: dict[RouterKind, Any] = {}
    with rank_groups(environment) as groups:
        for kind, top_k in TOP_K.items():
            limits = {"num_groups": GROUPS, "group_topk": 1} if kind is RouterKind.group_limited else {}
            settings = {"load_balancing_coefficient": 0.0, "scaling_factor": SCALING, **limits}
            layer = build_layer(groups, moe_config(E, top_k, kind=kind, **settings))
            if hasattr(layer.router, "bias"):
                layer.router.bias.copy_(torch.tensor(BIAS))
            layer.auxiliary_scale = 1.0
            hidden, gradient = tokens(S, B)
            output, _ = layer(hidden)
            output.backward(gradient)
            answer[kind] = as_arrays({
                "router": layer.router.weight, "gate_up": layer.experts.gate_up, "down": layer.experts.down,
                "x": hidden.flatten(0, 1), "dy": gradient.flatten(0, 1), "y": output.flatten(0, 1),
                "learned": layer.router.weight.grad,
            })  # fmt: skip
    return answer


def routed(kind: RouterKind, z: Tensor) -> dict[int, Tensor]:
    """Experts of one token with logits z [E], and the weight of each (docs/moe.md, "Kinds")."""
    top_k = TOP_K[kind]
    if kind in (RouterKind.topk, RouterKind.switch):
        score = z.exp() / z.exp().sum()
        order = sorted(range(E), key=lambda expert: -score[expert].item())
    else:
        score = 1 / (1 + (-z).exp())
        biased = [score[expert].item() + BIAS[expert] for expert in range(E)]
        allowed = list(range(E))
        if kind is RouterKind.group_limited:  # groups of two: the sum of a group's two best is its sum
            size = E // GROUPS
            best = max(range(GROUPS), key=lambda group: sum(biased[group * size : (group + 1) * size]))
            allowed = allowed[best * size : (best + 1) * size]
        order = sorted(allowed, key=lambda expert: -biased[expert])
    chosen = order[:top_k]
    whole = 1.0 if kind is RouterKind.switch else torch.stack([score[expert] for expert in chosen]).sum()
    return {expert: SCALING * score[expert] / whole for expert in chosen}


@pytest.mark.parametrize("kind", RouterKind)
def test_a_router_learns_from_the_language_model_what_the_equations_say(kind: RouterKind) -> None:
    given = {name: torch.from_numpy(values).double() for name, values in layers()[kind].items()}
    router = given["router"].requires_grad_()
    outputs, chosen = [], set()
    for x in given["x"]:
        parts = []
        for expert, weight in routed(kind, router @ x).items():
            gate, up = (given["gate_up"][expert] @ x).chunk(2)
            chosen.add(expert)
            parts.append(weight * (given["down"][expert] @ (gate / (1 + (-gate).exp()) * up)))
        outputs.append(torch.stack(parts).sum(dim=0))
    (torch.stack(outputs) * given["dy"]).sum().backward()
    assert router.grad is not None
    # fp32 against fp64.
    np.testing.assert_allclose(given["y"].numpy(), torch.stack(outputs).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert (given["learned"] - router.grad).norm() < 1e-5 * router.grad.norm()
    assert len(chosen) > E // 2 and router.grad[sorted(chosen)].norm(dim=1).min() > 0.1
