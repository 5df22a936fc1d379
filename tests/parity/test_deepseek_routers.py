"""Second and third opinion on DeepSeek-V3's routers and shared experts: Megatron-core's MoELayer, and Hugging Face's
DeepseekV3MoE, with the same weights and a bias that changes the choice."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks

E, K, S, B = 8, 4, 12, 4
# Megatron judges a group by its K / group_topk best scores, DeepSeek and we by two: the same here.
GROUPS = {"sigmoid_bias": (None, None), "group_limited": (4, 2)}
SCALING, BALANCE, BIAS_RATE = 2.5, 200.0, 0.01
PARTS = {"output", "input", "router", "gate_up", "down", "shared_fc1", "shared_fc2"}
# fp32: the same products, summed over tokens in another order, the router's weight before the down projection.
TOLERANCE = 2e-6


@pytest.mark.parametrize("kind", GROUPS)
def test_routers_and_shared_experts_equal_megatrons_with_the_balance_per_sequence(kind: str) -> None:
    (found,) = run_ranks(1, _against_megatron, kind)
    assert found["differences"].keys() == PARTS and max(found["differences"].values()) < TOLERANCE, found
    assert found["auxiliary"] > 0.05, "the loss must be seen in the router's gradient"
    assert found["load"] == found["their load"] and len(set(found["load"])) > 1
    assert found["bias"] == pytest.approx(found["their bias"], abs=1e-8)
    assert found["bias"] != pytest.approx(found["bias before"], abs=1e-4)


@pytest.mark.parametrize("kind", GROUPS)
def test_routers_and_shared_experts_equal_hugging_faces_deepseek_v3(kind: str) -> None:
    (found,) = run_ranks(1, _against_hugging_face, kind)
    assert found["differences"].keys() == PARTS and max(found["differences"].values()) < TOLERANCE, found
    assert found["moved by bias"] > 0.1 and (kind == "sigmoid_bias" or found["moved by groups"] > 0.1)


def _against_megatron(environment: Environment, kind: str) -> dict[str, Any]:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_updated_expert_bias

    from tests.moe.case import rank_groups, relative
    from tests.parity.megatron_layer import expert_gradients, megatron_layer

    with rank_groups(environment) as groups:
        config = _megatron_config(kind)
        layer = _layer(groups, config, kind, BALANCE)
        theirs = megatron_layer(groups, config, layer)
        layer.auxiliary_scale = 1.0
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
        ours = _ran(layer, layer)
        wanted = _ran(theirs, theirs) | expert_gradients(theirs)
        ours |= {name: getattr(layer.experts, name).grad for name in ("gate_up", "down")}
        load, before = layer.statistics.read(groups.device)[:E], layer.router.bias.tolist()
        layer.router.finish_step(load)
        their_load = theirs.router.local_tokens_per_expert.clone()
        moved = get_updated_expert_bias(theirs.router.local_tokens_per_expert, theirs.router.expert_bias, BIAS_RATE)
        plain = _layer(groups, config, kind, 0.0)
        return {
            "differences": {name: relative(value, wanted[name]) for name, value in ours.items()},
            "auxiliary": relative(ours["router"], _ran(plain, plain)["router"]),
            "load": load.tolist(), "their load": their_load.tolist(),
            "bias before": before, "bias": layer.router.bias.tolist(), "their bias": moved.tolist(),
        }  # fmt: skip


def _against_hugging_face(environment: Environment, kind: str) -> dict[str, Any]:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    from tests.moe.case import FFN, HIDDEN, rank_groups, relative, tokens

    with rank_groups(environment) as groups:
        layer = _layer(groups, _megatron_config(kind), kind, 0.0)
        num_groups, group_topk = GROUPS[kind]
        block = DeepseekV3MoE(DeepseekV3Config(
            hidden_size=HIDDEN, moe_intermediate_size=FFN, n_routed_experts=E, num_experts_per_tok=K,
            n_shared_experts=2, n_group=num_groups or 1, topk_group=group_topk or 1, routed_scaling_factor=SCALING,
            norm_topk_prob=True, experts_implementation="eager",
        ))  # fmt: skip
        mlp, shared = block.shared_experts, layer.shared_experts
        gate, up = shared.linear_fc1.weight.detach().chunk(2)
        pairs = {
            "router": (layer.router.weight, block.gate.weight), "gate_up": (layer.experts.gate_up,
            block.experts.gate_up_proj), "down": (layer.experts.down, block.experts.down_proj),
            "shared_fc2": (shared.linear_fc2.weight, mlp.down_proj.weight),
        }  # fmt: skip
        with torch.no_grad():
            for ours, theirs in (*pairs.values(), (gate, mlp.gate_proj.weight), (up, mlp.up_proj.weight)):
                theirs.copy_(ours)
            block.gate.e_score_correction_bias.copy_(layer.router.bias)
        results = []
        for run in (lambda x: layer(x)[0], block):
            hidden, gradient = tokens(S, B)
            output = run(hidden)
            output.backward(gradient)
            results.append({"output": output.detach(), "input": hidden.grad})
        ours, wanted = results
        fc1 = torch.cat((mlp.gate_proj.weight.grad, mlp.up_proj.weight.grad))
        differences = {name: relative(ours[name], wanted[name]) for name in ours}
        differences |= {name: relative(a.grad, b.grad) for name, (a, b) in pairs.items()}
        differences["shared_fc1"] = relative(shared.linear_fc1.weight.grad, fc1)
        chosen = _chosen(layer.router, tokens(S, B)[0])
        without_groups = _layer(groups, _megatron_config("sigmoid_bias"), "sigmoid_bias", 0.0)
        by_groups = (chosen != _chosen(without_groups.router, tokens(S, B)[0])).any(dim=1)
        layer.router.bias.zero_()
        by_bias = (chosen != _chosen(layer.router, tokens(S, B)[0])).any(dim=1)
        return {
            "differences": differences, "moved by bias": by_bias.float().mean().item(),
            "moved by groups": by_groups.float().mean().item(),
        }  # fmt: skip


def _layer(groups: Any, config: Any, kind: str, balance: float) -> Any:
    from gpt4moe.config.moe import LoadBalancingScope, RouterKind
    from tests.moe.case import FFN, build_layer, moe_config

    num_groups, group_topk = GROUPS[kind]
    moe = moe_config(
        E, K, kind=RouterKind(kind), num_groups=num_groups, group_topk=group_topk, scaling_factor=SCALING,
        load_balancing_coefficient=balance, load_balancing_scope=LoadBalancingScope.sequence,
        bias_update_rate=BIAS_RATE,
    )  # fmt: skip
    moe.shared_expert_ffn_hidden_size = 2 * FFN
    layer = build_layer(groups, moe, config=config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        layer.router.bias.copy_(0.3 * torch.randn(E, generator=generator))
        for weight in (layer.shared_experts.linear_fc1.weight, layer.shared_experts.linear_fc2.weight):
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
    return layer


def _megatron_config(kind: str) -> Any:
    from tests.moe.case import FFN
    from tests.parity.megatron_layer import megatron_config

    num_groups, group_topk = GROUPS[kind]
    return megatron_config(
        E, K, moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=BALANCE,
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=BIAS_RATE, moe_router_num_groups=num_groups, moe_router_group_topk=group_topk,
        moe_router_topk_scaling_factor=SCALING, moe_shared_expert_intermediate_size=2 * FFN,
    )  # fmt: skip


def _ran(run: Any, holder: Any) -> dict[str, Tensor]:
    """Output and gradients that both kinds of layer name alike."""
    from tests.moe.case import tokens

    hidden, gradient = tokens(S, B)
    output, _ = run(hidden)
    output.backward(gradient)
    shared = holder.shared_experts
    return {
        "output": output.detach(), "input": hidden.grad, "router": holder.router.weight.grad,
        "shared_fc1": shared.linear_fc1.weight.grad, "shared_fc2": shared.linear_fc2.weight.grad,
    }  # fmt: skip


def _chosen(router: Any, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        return router(hidden.reshape(-1, hidden.shape[-1])).expert_index.sort(dim=1).values
