"""Runs whose steps are computed twice: the same numbers, an error that ends the command, kernels that are not equal."""

import json
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.config.resilience import ResilienceConfig
from gpt4moe.errors import ConfigError, CorruptionError, DivergenceError
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

NAN, ONE_WRONG, A_BIT = (float("nan"),) * 3, (1.0, 1.0, 1.5), (1.0, 1.0 + 1e-6, 1.0)
AS_ON_GPUS: dict[str, tuple[tuple[float, ...], ...]] = {
    "noise": ((1 + 1e-5, 1.0, 1 - 1e-5), (1.0, 1 + 1e-5), (1.0, 1.5)),
    "two equal by chance": (A_BIT, A_BIT[:2], (1.0, 1.5)),
    "three equal by chance": ((1.0,) * 3, A_BIT[:2], (1.0, 1.5)),
    "one of three is wrong": (ONE_WRONG,),
    "not finite": (NAN, (1 + 1e-5, 1.0, 1 - 1e-5), NAN[:2], (1.0, 1 + 1e-5), (1.0, float("nan"))),
}
"""Name -> of each checked step the factor of one gradient in each pass."""


def _not_equal_kernels(environment: Environment) -> dict[str, list[tuple[str, float | None]]]:
    """Of each step of AS_ON_GPUS what it raised, and the tolerance after it."""
    answer: dict[str, list[tuple[str, float | None]]] = {}
    with world(environment) as device:
        run = load_run_config([*BASE, *MICRO])
        groups = ProcessGroups.create(Layout.from_config(run.parallel, 1), 0, device, run.run.seed)
        runner = StepRunner(run, ENGINES[run.engine.kind](build_model(run, groups), run, groups), groups)
        reduce, factors = runner.engine.reduce, [1.0]

        def reduced() -> None:
            reduce()
            next(iter(runner.engine.owned())).gradient.mul_(factors.pop(0))

        runner.engine.reduce = reduced  # type: ignore[method-assign]
        for name, steps in AS_ON_GPUS.items():
            check, answer[name] = Recheck(runner), []
            check.is_exact = False
            for step, of_passes in enumerate(steps, start=1):
                factors[:], raised = of_passes, ""
                try:
                    train_step(runner, step, synthetic_batches(run, step, 1, 0), check=check)
                except (CorruptionError, DivergenceError) as error:
                    raised = f"{type(error).__name__} {error.cause}"
                assert factors == []
                answer[name].append((raised, check.tolerance))
    return answer


@cache
def as_on_gpus() -> dict[str, list[tuple[str, float | None]]]:
    answer: dict[str, list[tuple[str, float | None]]]
    (answer,) = run_ranks(1, _not_equal_kernels)
    return answer


def test_where_kernels_are_not_equal_to_the_bit_the_first_checked_step_measures_what_may_differ() -> None:
    answer = as_on_gpus()
    for name, bound in (("noise", 1e-3), ("two equal by chance", 1e-4), ("three equal by chance", 2.0**-16)):
        calibrated, later, wrong = answer[name]
        assert calibrated == later and calibrated[0] == "" and 2.0**-16 <= (calibrated[1] or 0.0) <= bound, name
        assert wrong[0].startswith("CorruptionError") and "the gradient of " in wrong[0], name
    ((wrong_at_once, tolerance),) = answer["one of three is wrong"]
    assert wrong_at_once.startswith("CorruptionError") and "the gradient of " in wrong_at_once and tolerance is None


def test_a_step_that_is_not_finite_in_any_pass_is_no_flipped_bit() -> None:
    answer = as_on_gpus()
    lost, calibrated, lost_later, later, in_one_pass = answer["not finite"]
    assert lost[0].startswith("DivergenceError") and lost[1] is None
    assert calibrated[0] == later[0] == "" and calibrated[1] is not None and calibrated[1] < 1e-3
    assert lost_later[0].startswith("DivergenceError")
    assert in_one_pass[0].startswith("CorruptionError")


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
