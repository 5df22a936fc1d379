"""A new kind of layer is one row in each table: a toy attention, written in this file alone."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any, cast
from unittest.mock import patch

from gpt4moe.architecture import table
from gpt4moe.architecture.count import count_parameters
from gpt4moe.architecture.flops import flops_per_token
from gpt4moe.architecture.names import layer_name, split_name
from gpt4moe.architecture.rows import Cut, Family, Initial, TensorRow
from gpt4moe.architecture.tensors import logical_shapes
from gpt4moe.config.load import load_run_config
from gpt4moe.config.model import AttentionKind, LayerKind, MlpKind, ModelConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel import legality
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner import activations, memory
from tests.spawn import run_ranks

TOY = cast(AttentionKind, "toy")
MIXING = "self_attention.mixing"
PLAIN, WITH_TOY = LayerKind(AttentionKind.grouped_query, MlpKind.moe), LayerKind(TOY, MlpKind.moe)
ROW = TensorRow(
    name=MIXING, family=Family.qkv, shape=lambda m: (m.hidden_size, m.hidden_size), cut=Cut.whole,
    initial=Initial.normal,
)  # fmt: skip


def _toy_activations(micro: activations.MicroBatch, again: bool) -> dict[str, int]:
    return {"toy": micro.hidden_bytes}


@contextmanager
def toy_attention() -> Iterator[None]:
    """Layer 1 of every model multiplies each token by one matrix [H, H] in place of attention: its rows in the tables
    of the planner, of the architecture and of legality."""
    nothing: Any = lambda _: 0  # noqa: E731
    kind = table.AttentionRow(
        rows=(ROW,), score_width=nothing, gathered_width=nothing, cached_width=nothing, decoding_width=nothing,
        cache_parts=lambda _: 1,
    )  # fmt: skip
    tables: list[tuple[Any, Any]] = [
        (table.ATTENTION, kind),
        (legality.CUT_BY_ATTENTION, lambda _: {}),
        (activations.ATTENTION_ACTIVATIONS, _toy_activations),
        (memory.ATTENTION_WORKSPACE, nothing),
    ]
    kinds = property(lambda model: [WITH_TOY if layer == 1 else PLAIN for layer in range(model.num_layers)])
    with ExitStack() as stack:
        for of_kinds, row in tables:
            stack.enter_context(patch.dict(of_kinds, {TOY: row}))
        stack.enter_context(patch.object(ModelConfig, "layer_kinds", kinds))
        yield


def small_run() -> RunConfig:
    return load_run_config([
        "+experiment=tiny", "data=mock", "run.name=kinds", "model.num_layers=3", "model.hidden_size=64",
        "model.vocab_size=96", "model.seq_length=16",
    ])  # fmt: skip


def test_the_planner_counts_a_kind_by_its_rows() -> None:
    run = small_run()
    model, layout = run.model, Layout.from_config(run.parallel, 1)
    before, flops = count_parameters(model), flops_per_token(model)
    usual = memory.memory_per_stage(run, layout)[0]
    attention = sum(
        prod(shape) for name, shape in logical_shapes(model).items() if name.startswith(layer_name(1, "self_attention"))
    )
    matrix = model.hidden_size**2
    with toy_attention():
        assert not legality.layout_problems(model, run.parallel, run.training, 1)
        assert count_parameters(model).total == before.total - attention + matrix
        assert flops_per_token(model).layers == flops.layers - 6 * attention + 6 * matrix
        assert flops_per_token(model).attention * 3 == flops.attention * 2
        toy = memory.memory_per_stage(run, layout)[0]
        assert toy.activations_bytes < usual.activations_bytes
        assert toy.weights_bytes < usual.weights_bytes
    assert count_parameters(model) == before


def _built(environment: Environment) -> dict[str, Any]:
    import torch
    from megatron.core.transformer.spec_utils import ModuleSpec
    from torch import nn

    from gpt4moe.model import specs
    from gpt4moe.model.gpt import build_model
    from gpt4moe.model.parameters import shards
    from tests.moe.case import rank_groups

    class ToyAttention(nn.Module):
        def __init__(self, config: Any, layer_number: int, **_: Any):
            super().__init__()
            self.mixing = nn.Parameter(torch.empty(config.hidden_size, config.hidden_size))

        def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
            return hidden @ self.mixing.t(), None

    def toy(layer: ModuleSpec, built: specs.BuiltWith) -> None:
        layer.submodules.self_attention = ModuleSpec(module=ToyAttention)

    run = small_run()
    with toy_attention(), patch.dict(specs.ATTENTION_SPECS, {TOY: toy}), rank_groups(environment) as groups:
        (chunk,) = build_model(run, groups)
        tokens = torch.arange(16).unsqueeze(0)
        chunk(tokens, tokens, None).sum().backward()
        found = list(shards([chunk], groups))
        return {
            "shapes": {shard.name: shard.global_shape for _, shard, _ in found},
            "expected": logical_shapes(run.model),
            "deviation": {shard.name: parameter.std().item() for parameter, shard, _ in found},
            "gradients": {shard.name for parameter, shard, _ in found if parameter.grad is not None},
            "std": run.model.init_std,
        }


def test_the_model_builds_a_kind_and_names_and_fills_its_tensors_by_the_rows() -> None:
    (built,) = run_ranks(1, _built)
    name = layer_name(1, MIXING)
    assert built["shapes"] == built["expected"]
    assert [split_name(found)[0] for found in built["shapes"] if found.endswith(MIXING)] == [1]
    assert abs(built["deviation"][name] / built["std"] - 1) < 0.1
    assert name in built["gradients"]


def test_kinds_that_share_a_name_cut_and_start_it_alike() -> None:
    """A tensor's row is found by its name (architecture.tensors.row_of), whatever kind its layer is of."""
    parts = [kind.rows for kind in table.ATTENTION.values()], list(table.MLP.values())
    for kinds in parts:
        rows: dict[str, TensorRow] = {}
        for row in (row for kind in kinds for row in kind):
            first = rows.setdefault(row.name, row)
            assert (first.cut, first.family) == (row.cut, row.family)
            assert row.initial in (first.initial, None)
