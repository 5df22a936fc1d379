"""A second optimizer, declared here alone: engines, checkpoints and refusals follow the table of optimizers."""

import dataclasses
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt4moe.checkpoint.index import CheckpointIndex
from gpt4moe.checkpoint.inspection import verification
from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.reader import CheckpointReader
from gpt4moe.config.load import load_run_config
from gpt4moe.config.optimizer import EngineKind, OptimizerKind
from gpt4moe.config.optimizer_table import OPTIMIZERS, Optimizer
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import CheckpointError, ConfigError
from gpt4moe.model.gpt import build_model
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.states import owned_bytes
from gpt4moe.training.build import ENGINES
from gpt4moe.training.checkpointing import fill
from gpt4moe.training.engine import Engine
from gpt4moe.training.pieces import owned_pieces
from tests.checkpoint.builders import dealt, write_checkpoint
from tests.distributed.case import BASE
from tests.spawn import run_ranks


class Other(str, Enum):
    """Kinds of this test alone."""

    momentum = "momentum"
    unknown = "unknown"


MOMENTUM: Any = Other.momentum
ROW = Optimizer(
    states=("momentum_buffer",),
    step_name=None,  # SGD counts nothing
    engines={EngineKind.deepspeed: "SGD"},
    arguments=lambda given: {"momentum": given.beta1},
)
SMALL = (*BASE, "model.num_layers=2", "engine=deepspeed")
CONFIG = {"optimizer": {"kind": "momentum"}}


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, MOMENTUM, ROW)


def _engine(environment: Environment, device: torch.device, run: RunConfig) -> tuple[Engine, ProcessGroups]:
    groups = ProcessGroups.create(
        Layout.from_config(run.parallel, environment.world_size), environment.rank, device, run.run.seed
    )
    return ENGINES[run.engine.kind](build_model(run, groups), run, groups), groups


def _stepped(environment: Environment, overrides: tuple[str, ...], load: Path | None) -> list[tuple[Any, ...]]:
    """What this rank owns after an update with gradients of 1; loaded from `load` instead where one is given."""
    OPTIMIZERS[MOMENTUM] = ROW
    run = load_run_config([*SMALL, "optimizer.weight_decay=0", *overrides])
    run.optimizer.kind = MOMENTUM
    with world(environment) as device:
        engine, groups = _engine(environment, device, run)
        if load is not None:
            reader = CheckpointReader(load)
            fill(reader, engine, groups, weights_only=False, names=reader.shapes)
            engine.finish_load(reader.manifest.optimizer_step)
        else:
            engine.zero_gradients()
            engine.chunks[0].finish_grad_sync()
            engine.reduce()
            for owned in engine.owned():
                owned.gradient.fill_(1.0)
            engine.update(0.5)
        return [
            (piece.tensor, piece.global_shape, piece.offset, piece.values.detach().clone().view(piece.shape).numpy())
            for piece in owned_pieces(engine, groups)
        ]


def _assembled(answers: list[list[tuple[Any, ...]]]) -> dict[str, np.ndarray]:
    whole: dict[str, np.ndarray] = {}
    for name, shape, offset, values in (part for answer in answers for part in answer):
        where = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
        whole.setdefault(name, np.full(shape, np.nan, dtype=np.float32))[where] = values
    return whole


@pytest.mark.usefixtures("declared")
def test_its_state_is_written_covered_and_loaded_on_another_layout(tmp_path: Path) -> None:
    two = _assembled(run_ranks(2, _stepped, ("parallel.tp=2", "parallel.ep=2"), None))
    kinds = {name.partition("/")[0] for name in two}
    assert kinds == {"weight", "momentum_buffer"}, "neither AdamW's states nor AdamW's update"
    assert all((value == 1).all() for name, value in two.items() if name.startswith("momentum_buffer/"))

    write_checkpoint(tmp_path / "x", dealt(two, 2), config=CONFIG, optimizer_step=1)
    assert list(CheckpointIndex(tmp_path / "x").problems()) == []
    loaded = _assembled(run_ranks(1, _stepped, (), tmp_path / "x"))
    assert loaded.keys() == two.keys()
    for name, value in two.items():
        np.testing.assert_array_equal(loaded[name], value, err_msg=name)


@pytest.mark.usefixtures("declared")
def test_a_weight_without_its_state_is_a_damaged_checkpoint(tmp_path: Path) -> None:
    arrays = {name: np.ones(3, dtype=np.float32) for name in ("weight/a", "weight/b", "momentum_buffer/a")}
    write_checkpoint(tmp_path / "frozen", dealt(arrays, 1), config=CONFIG)
    assert list(CheckpointIndex(tmp_path / "frozen").problems()) == []  # b has no state at all: frozen
    del arrays["weight/a"]
    write_checkpoint(tmp_path / "x", dealt(arrays, 1), config=CONFIG)
    assert list(CheckpointIndex(tmp_path / "x").problems()) == ["weight/a: the whole tensor is missing"]


def test_a_checkpoint_that_names_no_optimizer_is_of_adamw(tmp_path: Path) -> None:
    arrays = {name: np.ones(3, dtype=np.float32) for name in ("weight/a", "exp_avg/a")}
    write_checkpoint(tmp_path / "x", dealt(arrays, 1), config={})
    assert Manifest.load(tmp_path / "x").optimizer is OPTIMIZERS[OptimizerKind.adamw]
    assert list(CheckpointIndex(tmp_path / "x").problems()) == ["exp_avg_sq/a: the whole tensor is missing"]


def test_an_optimizer_that_the_table_lacks_is_named_by_verify_and_its_weights_still_load(tmp_path: Path) -> None:
    arrays = {"weight/a": np.ones(3, dtype=np.float32)}
    write_checkpoint(tmp_path / "x", dealt(arrays, 1), config={"optimizer": {"kind": "unknown"}})
    (problem,) = verification(tmp_path / "x")["problems"]
    assert "optimizer.kind is unknown, which is none of adamw" in problem
    assert CheckpointReader(tmp_path / "x").tensor("weight/a").tolist() == [1, 1, 1]


def _refusals(environment: Environment, folder: Path) -> list[str]:
    """Each engine's of a kind the table lacks and of one it cannot run; of AdamW's states by a momentum run."""
    causes = []
    for engine in ("megatron", "deepspeed"):
        run = load_run_config([*BASE, "model.num_layers=2", f"engine={engine}"])
        for kind in Other:
            run.optimizer.kind = kind  # type: ignore[assignment]
            OPTIMIZERS.pop(MOMENTUM, None)
            if engine == "megatron":
                OPTIMIZERS[MOMENTUM] = ROW
            with world(environment) as device, pytest.raises(ConfigError) as refused:
                _engine(environment, device, run)
            causes.append(refused.value.cause)
    OPTIMIZERS[MOMENTUM] = ROW
    run = load_run_config(list(SMALL))
    run.optimizer.kind = MOMENTUM
    with world(environment) as device:
        engine, groups = _engine(environment, device, run)
        with pytest.raises(CheckpointError) as other:
            fill(CheckpointReader(folder), engine, groups, weights_only=False, names=[])
    return [*causes, other.value.cause]


def test_no_engine_trains_adamw_in_silence_and_states_of_another_optimizer_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x", [[]], config={})
    ((*engines, states),) = run_ranks(1, _refusals, tmp_path / "x")
    assert len(engines) == 4
    assert all("optimizer.kind=" in cause and "which runs adamw only" in cause for cause in engines), engines
    assert "has the optimizer states exp_avg, exp_avg_sq; this run's optimizer keeps momentum_buffer" in states


@pytest.mark.usefixtures("declared")
def test_the_planner_counts_its_bytes() -> None:
    run = load_run_config(list(SMALL))
    assert owned_bytes(run) == 12
    run.optimizer = dataclasses.replace(run.optimizer, kind=MOMENTUM)
    assert owned_bytes(run) == 8
