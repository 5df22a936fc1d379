"""Where the tensors of a built model lie, and which kernels are refused before it is built."""

import pytest

from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks


def test_every_parameter_and_buffer_is_made_on_the_device_of_the_groups() -> None:
    """On a GPU nothing moves what was made on the CPU, unless there is an engine: generation and evaluation have none.

    The meta device stands for the GPU. Megatron's modules are built as on a GPU, so they name their device themselves.
    """
    ((names, elsewhere),) = run_ranks(1, _built)
    assert {"decoder.final_layernorm.weight", "decoder.layers.0.mlp.router.bias"} <= names
    assert elsewhere == []


def _built(environment: Environment) -> tuple[set[str], list[str]]:
    """Names of all parameters and buffers, and of those that do not lie on the groups' device."""
    from gpt4moe.config.load import load_run_config
    from gpt4moe.model import gpt
    from gpt4moe.parallel.layout import Layout
    from gpt4moe.parallel.meta_device import pretended_rank
    from tests.distributed.case import BASE

    made = gpt.transformer_config
    gpt.transformer_config = lambda *arguments, **given: made(*arguments, **given | {"on_gpu": True})  # type: ignore
    run = load_run_config([*BASE, "model.qk_norm=true", "router@model.moe.router=sigmoid_bias"])
    with pretended_rank(Layout.from_config(run.parallel, 1), 0) as groups:
        (chunk,) = gpt.build_model(run, groups)
        tensors = dict(chunk.named_parameters()) | dict(chunk.named_buffers())
        return set(tensors), [name for name, tensor in tensors.items() if tensor.device != groups.device]


def test_the_first_loss_shows_a_tensor_that_nothing_loaded() -> None:
    ((shown, hidden),) = run_ranks(1, _losses_without_one)
    assert len(shown) > 20
    assert hidden == []


def _losses_without_one(environment: Environment) -> tuple[list[str], list[str]]:
    """Names of the parameters without which, alone, the loss is no number, and of the others."""
    import torch

    from gpt4moe.config.load import load_run_config
    from gpt4moe.model.gpt import build_model
    from gpt4moe.model.parameters import initialize, shards
    from gpt4moe.parallel.groups import ProcessGroups, world
    from gpt4moe.parallel.layout import Layout
    from gpt4moe.parallel.shard import WEIGHT
    from tests.distributed.case import BASE

    run = load_run_config([*BASE, "model.qk_norm=true", "model.tied_embeddings=false"])
    tokens = torch.arange(1, 129).view(2, 64) % run.model.vocab_size
    places = torch.arange(64).expand(2, -1)
    shown, hidden = [], []
    with world(environment) as device:
        groups = ProcessGroups.create(Layout.from_config(run.parallel, 1), 0, device, 0)
        (chunk,) = build_model(run, groups)
        for parameter, shard, _ in shards([chunk], groups):
            kept = parameter.detach().clone()
            initialize([chunk], run.model, groups, 0, loaded=[f"{WEIGHT}/{shard.name}"])
            with torch.no_grad():
                is_shown = bool(chunk(tokens, places, None).isnan().any())
                parameter.copy_(kept)
            (shown if is_shown else hidden).append(shard.name)
    return shown, hidden


@pytest.mark.parametrize("kernel", ["grouped_mm", "per_expert"])
def test_sizes_that_the_grouped_product_does_not_take_are_refused_before_the_model_is_built(kernel: str) -> None:
    (cause,) = run_ranks(1, _refusal, kernel)
    assert (cause is None) == (kernel == "per_expert")
    assert cause is None or "model.moe.ffn_hidden_size=28 is no multiple of 8" in cause


def _refusal(environment: Environment, kernel: str) -> str | None:
    from gpt4moe.config.load import load_run_config
    from gpt4moe.errors import LayoutError
    from gpt4moe.model.gpt import build_model
    from gpt4moe.parallel.layout import Layout
    from gpt4moe.parallel.meta_device import pretended_rank
    from tests.distributed.case import BASE

    changes = ["model.moe.ffn_hidden_size=28", "precision=bf16", f"kernels.experts={kernel}"]
    run = load_run_config([*BASE, *changes])
    with pretended_rank(Layout.from_config(run.parallel, 1), 0) as groups:
        try:
            build_model(run, groups)
        except LayoutError as error:
            return error.cause
    return None
