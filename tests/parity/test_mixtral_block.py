"""Second opinion: ExpertParallelMLP against Hugging Face's MixtralSparseMoeBlock on the same weights."""

import pytest
import torch

from gpt4moe.config.kernels import ExpertKernel
from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks

E, K = 8, 2


@pytest.mark.parametrize("kernel", [ExpertKernel.per_expert, ExpertKernel.grouped_mm])
def test_the_layer_equals_mixtrals_block_in_value_and_every_gradient(kernel: ExpertKernel) -> None:
    (differences,) = run_ranks(1, _against_mixtral, kernel)
    assert set(differences) == {"output", "input", "router", "gate_up", "down"}
    # fp32: the same products, the router's weight applied before the down projection instead of after it.
    assert max(differences.values()) < 2e-6, differences


def _against_mixtral(environment: Environment, kernel: ExpertKernel) -> dict[str, float]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    from tests.moe.case import FFN, HIDDEN, build_layer, moe_config, rank_groups, relative, tokens

    with rank_groups(environment) as groups:
        layer = build_layer(groups, moe_config(E, K, load_balancing_coefficient=0.0), kernel)
        shape = {"hidden_size": HIDDEN, "intermediate_size": FFN}
        config = MixtralConfig(**shape, num_local_experts=E, num_experts_per_tok=K, experts_implementation="eager")
        block = MixtralSparseMoeBlock(config)
        pairs = {
            "router": (layer.router.weight, block.gate.weight),
            "gate_up": (layer.experts.gate_up, block.experts.gate_up_proj),
            "down": (layer.experts.down, block.experts.down_proj),
        }
        with torch.no_grad():
            for ours, theirs in pairs.values():
                theirs.copy_(ours)
        found = []
        for run in (lambda x: layer(x)[0], block):
            hidden, gradient = tokens(12, 4)
            output = run(hidden)
            output.backward(gradient)
            found.append((output.detach(), hidden.grad))
        (output, grad), (wanted_output, wanted_grad) = found
        differences = {"output": relative(output, wanted_output), "input": relative(grad, wanted_grad)}
        return differences | {name: relative(ours.grad, theirs.grad) for name, (ours, theirs) in pairs.items()}
