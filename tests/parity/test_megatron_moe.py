"""Second opinion: ExpertParallelMLP against Megatron-core's own MoELayer, auxiliary losses included."""

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
    from tests.parity.megatron_layer import expert_gradients, megatron_config, megatron_layer

    config = megatron_config(
        E, K, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=balance, moe_z_loss_coeff=z_loss or None
    )
    with rank_groups(environment) as groups:
        router = {"load_balancing_coefficient": balance, "z_loss_coefficient": z_loss}
        layer = build_layer(groups, moe_config(E, K, **router))
        theirs = megatron_layer(groups, config, layer)
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
        wanted |= expert_gradients(theirs)
        ours["router"], wanted["router"] = layer.router.weight.grad, theirs.router.weight.grad
        differences = {name: relative(value, wanted[name]) for name, value in ours.items()}

        plain = build_layer(groups, moe_config(E, K, load_balancing_coefficient=0.0))
        hidden, gradient = tokens(12, 4)
        plain(hidden)[0].backward(gradient)
        auxiliary = relative(wanted["router"], plain.router.weight.grad)
        return differences | {"auxiliary part of the router's gradient": auxiliary}
