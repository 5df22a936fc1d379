"""Second opinion: ExpertParallelMLP against Megatron-core's own MoELayer, auxiliary losses included."""

from typing import Any

import pytest
import torch

from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks

E, K = 8, 2


@pytest.mark.parametrize(("balance", "z_loss"), [(0.0, 0.0), (50.0, 0.0), (0.0, 5.0), (50.0, 5.0)])
def test_the_layer_equals_megatrons_in_value_and_every_gradient(balance: float, z_loss: float) -> None:
    (differences,) = run_ranks(1, _against_megatron, balance, z_loss)
    assert differences.pop("auxiliary part of the router's gradient") > (0.05 if balance or z_loss else -1)
    assert set(differences) == {"output", "input", "router", "gate_up", "down"}
    # fp32: the same products, summed over tokens in another order.
    assert max(differences.values()) < 2e-6, differences


def _against_megatron(environment: Environment, balance: float, z_loss: float) -> dict[str, float]:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from tests.moe.case import build_layer, moe_config, rank_groups, relative, tokens

    with rank_groups(environment) as groups:
        router = {"load_balancing_coefficient": balance, "z_loss_coefficient": z_loss}
        layer = build_layer(groups, moe_config(E, K, **router))
        theirs = _megatron_layer(groups, layer, balance, z_loss)
        layer.auxiliary_scale = 1.0
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
        found = []
        for run in (layer, theirs):
            hidden, gradient = tokens(12, 4)
            output, bias = run(hidden)
            assert bias is None
            output.backward(gradient)
            found.append({"output": output.detach(), "input": hidden.grad})
        ours, wanted = found
        ours |= {name: getattr(layer.experts, name).grad for name in ("gate_up", "down")}
        wanted |= {
            name: torch.stack([weight.grad for weight in _weights(theirs, name)]) for name in ("gate_up", "down")
        }
        ours["router"], wanted["router"] = layer.router.weight.grad, theirs.router.weight.grad
        differences = {name: relative(value, wanted[name]) for name, value in ours.items()}

        plain = build_layer(groups, moe_config(E, K, load_balancing_coefficient=0.0))
        hidden, gradient = tokens(12, 4)
        plain(hidden)[0].backward(gradient)
        auxiliary = relative(wanted["router"], plain.router.weight.grad)
        return differences | {"auxiliary part of the router's gradient": auxiliary}


def _megatron_layer(groups: Any, layer: Any, balance: float, z_loss: float) -> Any:
    """Megatron's layer with `layer`'s weights. Its all-gather dispatcher: the all-to-all one needs CUDA streams."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.spec_utils import build_module

    from gpt4moe.parallel.cpu_device import BuildOnCpu
    from tests.moe.case import FFN, HIDDEN

    # Without Transformer Engine megatron-core 0.16.1 reads this name although it never imported it.
    moe_utils.te_general_gemm = None
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=1, num_moe_experts=E, moe_router_topk=K,
        moe_ffn_hidden_size=FFN, moe_token_dispatcher_type="allgather", moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=balance, moe_z_loss_coeff=z_loss or None, moe_router_dtype="fp32",
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        bias_activation_fusion=False, gradient_accumulation_fusion=False, use_cpu_initialization=True,
    )  # fmt: skip
    with BuildOnCpu():
        spec = get_moe_module_spec(use_te=False, num_experts=E, moe_grouped_gemm=False)
        theirs = build_module(spec, config=config, pg_collection=groups.megatron)
    theirs.set_layer_number(1)
    with torch.no_grad():
        theirs.router.weight.copy_(layer.router.weight)
        for name in ("gate_up", "down"):
            for weight, values in zip(_weights(theirs, name), getattr(layer.experts, name), strict=True):
                weight.copy_(values)
    return theirs


def _weights(theirs: Any, name: str) -> list[torch.nn.Parameter]:
    linear = {"gate_up": "linear_fc1", "down": "linear_fc2"}[name]
    return [getattr(expert, linear).weight for expert in theirs.experts.local_experts]
