"""Runs whose steps are computed twice: the same numbers, an error that ends the command, kernels that are not equal."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from gpt4moe.config.load import load_run_config
from gpt4moe.config.resilience import ResilienceConfig
from gpt4moe.errors import ConfigError, CorruptionError
from gpt4moe.model.gpt import build_model
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.training.build import ENGINES
from gpt4moe.training.recheck import Recheck
from gpt4moe.training.step import StepRunner
from gpt4moe.training.update import train_step
from tests.distributed.case import BASE, synthetic_batches
from tests.spawn import run_ranks
from tests.training.command import SMALL, Ended, metrics, run_rank, saved_state, train
from tests.training.test_recheck import MICRO, flip_bit


def _not_equal_kernels(environment: Environment) -> dict[str, Any]:
    """Steps of a run whose gradients are never twice the same, as on a GPU; and of one where they are."""
    answer: dict[str, Any] = {}
    with world(environment) as device:
        run = load_run_config([*BASE, *MICRO])
        groups = ProcessGroups.create(Layout.from_config(run.parallel, 1), 0, device, run.run.seed)
        for name, noise in (("noisy", 1e-6), ("equal", 0.0)):
            runner = StepRunner(run, ENGINES[run.engine.kind](build_model(run, groups), run, groups), groups)
            check, reduce, draws = Recheck(runner), runner.engine.reduce, torch.Generator().manual_seed(1)
            check.is_exact, factors = False, [1.0]

            def reduced(
                runner: Any = runner, reduce: Any = reduce, draws: Any = draws, noise: float = noise,
                factors: Any = factors,
            ) -> None:  # fmt: skip
                reduce()
                for owned in runner.engine.owned():
                    owned.gradient.mul_(1 + noise * torch.randn(owned.gradient.shape, generator=draws))
                (owned, *_) = runner.engine.owned()
                owned.gradient[0] += factors.pop() - 1.0 if len(factors) > 1 else 0.0

            runner.engine.reduce = reduced  # type: ignore[method-assign]
            for step in (1, 2):
                train_step(runner, step, synthetic_batches(run, step, 1, 0), check=check)
            answer[name] = (check.is_exact, check.tolerance)
            factors.append(1.001)
            with pytest.raises(CorruptionError) as raised:
                train_step(runner, 3, synthetic_batches(run, 3, 1, 0), check=check)
            answer[f"{name} error"] = raised.value.cause
            check.is_exact, check.tolerance = False, None
            factors.append(1.001)
            if not noise:  # the passes that calibrate: two are equal, so the third is wrong
                with pytest.raises(CorruptionError) as raised:
                    train_step(runner, 3, synthetic_batches(run, 3, 1, 0), check=check)
                answer["calibration"] = raised.value.cause
    return answer


def test_where_kernels_are_not_equal_to_the_bit_the_first_checked_step_measures_what_may_differ() -> None:
    (answer,) = run_ranks(1, _not_equal_kernels)
    is_exact, tolerance = answer["noisy"]
    assert not is_exact and 1e-8 < tolerance < 1e-4
    assert answer["equal"] == (True, None)
    assert "the gradient of " in answer["noisy error"] and "seen first after its last" in answer["equal error"]
    assert "the gradient of " in answer["calibration"]


def test_a_run_whose_steps_are_computed_twice_is_the_run_without(tmp_path: Path, whole_run: Path) -> None:
    folder = tmp_path / "x"
    ten = ("training.steps=10", "checkpoint.every=5", "checkpoint.keep=0")
    (ended,) = train(folder, *ten, "resilience.recompute_every=3")
    assert ended.status == 0, ended.err
    assert metrics(folder) == metrics(whole_run)
    assert saved_state(folder, 10) == saved_state(whole_run, 10) != {}
    assert [it["step"] for it in _events(folder) if it["event"] == "recompute"] == [3, 6, 9]


def _with_a_flip(environment: Environment, arguments: list[str]) -> Ended:
    """A run in which rank 1 flips a bit of a weight after step 3."""
    twice = Recheck.twice

    def flipping(check: Recheck, *args: Any) -> Any:
        if check.groups.rank == 1:
            flip_bit(next(iter(check.engine.chunks[0].parameters())), 1)
        return twice(check, *args)

    with patch.object(Recheck, "twice", flipping):
        return run_rank(environment, arguments, (), {})


def test_a_flipped_bit_ends_the_command_with_status_1_and_an_event(tmp_path: Path) -> None:
    arguments = [*SMALL, f"run.root={tmp_path}", "run.name=x", "parallel.tp=2", "resilience.recompute_every=4"]
    arguments.append("checkpoint.every=3")
    ended = run_ranks(2, _with_a_flip, arguments)
    assert [rank.status for rank in ended] == [1, 1]
    cause, cure = ended[0].err.splitlines()
    assert "Step 4 was computed twice" in cause and "rank 1 (" in cause and "weight embedding.word" in cause
    assert "start again" in cure and "A checkpoint of step 3 may hold" in cure
    assert (tmp_path / "x" / "checkpoints" / "step-00000003" / "suspect.json").is_file()
    (stop,) = [it for it in _events(tmp_path / "x") if it["event"] == "stop"]
    assert stop["reason"] == "CorruptionError" and "rank 1" in stop["cause"]


def _events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(ConfigError, match="recompute_every=-1"):
        ResilienceConfig(recompute_every=-1).validate()
