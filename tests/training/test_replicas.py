"""Copies of one tensor stay equal to the bit, and what does not is named with its ranks."""

from contextlib import nullcontext
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks

OVERRIDES = (
    "router@model.moe.router=sigmoid_bias", "model.tied_embeddings=true", "model.num_layers=2",
    "training.check_replicas_every=2",
)  # fmt: skip
# rank = tp + 2 * dp + 4 * pp; ep 2 over tp, so experts have their copies on the other dp rank.
LAYOUT = ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2")
FLIPS = {
    "decoder.layers.0.mlp.router.weight": (2, [0, 1, 3]),
    "decoder.layers.1.mlp.router.bias": (7, [4, 5, 6]),
    "decoder.layers.0.input_layernorm.weight": (1, [0, 2, 3]),
    "decoder.layers.0.self_attention.linear_qkv.weight": (3, [1]),
    "decoder.layers.1.mlp.experts.gate_up": (6, [4]),
    "embedding.word_embeddings.weight": (4, [0]),
}
"""Tensor -> the rank whose copy is spoilt, ranks that hold it unspoilt."""


@cache
def ran() -> list[dict[str, Any]]:
    return run_ranks(8, _run)


def _run(environment: Environment) -> dict[str, Any]:
    from gpt4moe.config.load import load_run_config
    from gpt4moe.model.gpt import build_model
    from gpt4moe.model.parameters import buffers, shards
    from gpt4moe.parallel.groups import ProcessGroups, world
    from gpt4moe.parallel.layout import Layout
    from gpt4moe.training.engine_megatron import MegatronEngine
    from gpt4moe.training.replicas import unequal_copies
    from tests.distributed.case import BASE

    run = load_run_config([*BASE, *OVERRIDES, *LAYOUT])
    with world(environment) as device:
        layout = Layout.from_config(run.parallel, environment.world_size)
        groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed)
        engine = MegatronEngine(build_model(run, groups), run, groups)
        here: dict[str, torch.Tensor] = {shard.name: p for p, shard, _ in shards(engine.chunks, groups)}
        here |= {shard.name: buffer for buffer, shard in buffers(engine.chunks, groups)}
        answer: dict[str, Any] = {"clean": unequal_copies(engine, groups), "found": {}}
        for name, (rank, _) in FLIPS.items():
            _flip(here, name, if_so=groups.rank == rank)
            answer["found"][name] = [(it.name, it.odd_ranks, it.other_ranks) for it in unequal_copies(engine, groups)]
            _flip(here, name, if_so=groups.rank == rank)
        for owned in engine.owned():
            if owned.parameter is here.get("decoder.layers.0.mlp.router.weight") and groups.coordinate["tp"] == 1:
                owned.states["exp_avg"][0] += 1e-30
        answer["moment"] = [it.name for it in unequal_copies(engine, groups)]
        answer["errors"] = [_callback(run, engine, groups, step) for step in (1, 2)]
    return answer


def _flip(here: dict[str, torch.Tensor], name: str, *, if_so: bool) -> None:
    """The lowest bit of the last element."""
    if if_so:
        here[name].detach().view(torch.int32).view(-1)[-1] ^= 1


def _callback(run: Any, engine: Any, groups: Any, step: int) -> tuple[str, int, int] | None:
    """The error, its exit status, how many reasons the checkpoint of step 1 has to be suspect."""
    from gpt4moe.checkpoint.health import reasons
    from gpt4moe.checkpoint.retention import step_folder
    from gpt4moe.errors import Gpt4MoeError
    from gpt4moe.training.callbacks.saving import Replicas

    with TemporaryDirectory() as checkpoints:
        saved = step_folder(Path(checkpoints), 1)
        saved.mkdir()
        context = SimpleNamespace(
            run=run, engine=engine, groups=groups, state=SimpleNamespace(step=step), pause=lambda kind: nullcontext(),
            folder=SimpleNamespace(checkpoints=Path(checkpoints)),
        )  # fmt: skip
        try:
            Replicas().on_step(context, {}, None)  # type: ignore[arg-type]
        except Gpt4MoeError as error:
            return str(error), error.exit_code, len(reasons(saved))
        return None


def test_copies_are_equal_at_the_start() -> None:
    assert all(answer["clean"] == [] for answer in ran())


@pytest.mark.parametrize("name", FLIPS)
def test_one_flipped_bit_is_named_with_its_rank_on_every_rank_that_has_a_part(name: str) -> None:
    odd, others = FLIPS[name]
    for rank, answer in enumerate(ran()):
        expected = [(name, [odd], others)] if rank in (odd, *others) else []
        # The word embedding is also compared within its own stage, over dp.
        if name == "embedding.word_embeddings.weight":
            assert rank not in (0, 4) or (name, [odd], others) in answer["found"][name]
            continue
        assert answer["found"][name] == expected


def test_a_moment_that_is_not_its_copys_is_found() -> None:
    names = {name for answer in ran()[:4] for name in answer["moment"]}
    assert any(name.startswith("exp_avg of decoder.layers.0.mlp.router.weight[") for name in names)


def _adapters(environment: Environment) -> tuple[list[Any], list[str]]:
    """Adapters of experts over etp 2, on two ranks: what differs at first, and with one moment of rank 1 moved."""
    from gpt4moe.config.load import load_run_config
    from gpt4moe.model.gpt import build_model
    from gpt4moe.parallel.groups import ProcessGroups, world
    from gpt4moe.parallel.layout import Layout
    from gpt4moe.training.engine_megatron import MegatronEngine
    from gpt4moe.training.replicas import unequal_copies
    from tests.distributed.case import BASE

    run = load_run_config([*BASE, "model.num_layers=1", "parallel.tp=2", "parallel.etp=2", "stage.lora.rank=2"])
    with world(environment) as device:
        groups = ProcessGroups.create(Layout.from_config(run.parallel, 2), environment.rank, device, run.run.seed)
        chunks = build_model(run, groups)
        engine = MegatronEngine(chunks, run, groups)
        clean = unequal_copies(engine, groups)
        names = {id(p): name for chunk in engine.chunks for name, p in chunk.named_parameters()}
        for owned in engine.owned():
            name = names[id(owned.parameter)]
            if groups.rank == 1 and "experts" in name and "lora_" in name:
                owned.states["exp_avg"][0] += 1e-30
        return clean, [it.name for it in unequal_copies(engine, groups)]


def test_a_moment_of_an_adapter_that_is_whole_over_etp_is_compared() -> None:
    """Of gate and up A is whole and B is cut, of down the other way round: the two that are cut are no copies."""
    for clean, found in run_ranks(2, _adapters):
        assert clean == [] and len(found) == 2
        assert all(name.startswith("exp_avg of decoder.layers.0.mlp.experts.") for name in found)


def test_every_rank_ends_with_the_same_error_and_only_on_the_steps_asked_for() -> None:
    assert {answer["errors"][0] for answer in ran()} == {None}
    ((text, exit_code),) = {answer["errors"][1][:2] for answer in ran()}
    assert "exp_avg of decoder.layers.0.mlp.router.weight" in text
    assert "step 0 or before" in text and exit_code == 1
    assert [answer["errors"][1][2] for answer in ran()] == [1, 0, 0, 0, 0, 0, 0, 0], "rank 0 marks what was saved since"


def test_a_checksum_sees_order_and_every_bit() -> None:
    from gpt4moe.parallel.handed import checksum

    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    same = checksum(tensor)
    for place in (0, 7, 999):
        for bit in range(31):
            other = tensor.clone()
            other.view(torch.int32)[place] ^= 1 << bit
            assert checksum(other) != same
    assert checksum(tensor.flip(0)) != same
    assert checksum(tensor.bfloat16()) != checksum(tensor.bfloat16().flip(0))
