"""A job that Slurm restarts by itself stops when that leads nowhere, and says why."""

from pathlib import Path

import pytest

from gpt4moe.config.resilience import ResilienceConfig
from gpt4moe.errors import ConfigError, LaunchError
from gpt4moe.parallel.environment import Environment
from gpt4moe.resilience.restarts import refuse_endless_restarts
from gpt4moe.runlog.events_log import read_events
from gpt4moe.runlog.run_files import add_sums
from tests.spawn import run_ranks
from tests.training.command import SMALL, run_rank, train

LIMITS = ResilienceConfig()


def test_starts_from_one_step_are_stopped_once_slurm_makes_them() -> None:
    refuse_endless_restarts(0, [41] * 9, 41, LIMITS)  # a person may try as often as he likes
    refuse_endless_restarts(9, [1, 41, 41], 41, LIMITS)
    with pytest.raises(LaunchError, match="3 starts in a row began at step 41"):
        refuse_endless_restarts(1, [1, 41, 41, 41], 41, LIMITS)


def test_progress_between_restarts_is_no_loop() -> None:
    refuse_endless_restarts(50, [1, 41, 41, 41], 61, LIMITS)
    refuse_endless_restarts(50, [41, 41, 1, 41], 41, LIMITS)


def test_restarts_have_a_cap() -> None:
    with pytest.raises(LaunchError, match=r"101 times, more than resilience.max_restarts=100"):
        refuse_endless_restarts(101, list(range(101)), 500, LIMITS)


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="would refuse the first restart"):
        ResilienceConfig(max_stuck_starts=0).validate()


def test_the_trainer_ends_with_2_in_a_crash_loop(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    keys = ("resilience.max_stuck_starts=1", "training.steps=4")
    assert train(folder, *keys, "training.steps=2")[0].status == 0
    replace_in_start(folder, "first_step: 1", "first_step: 3")
    (ended,) = train(folder, *keys, variables={"GPT4MOE_CHAIN_LINK": "1", "SLURM_RESTART_COUNT": "0"})
    assert ended.status == 0, "its own last start's config asks for 2 steps: done"
    replace_in_start(folder, "  steps: 2", "  steps: 4")
    (ended,) = train(folder, *keys, variables={"SLURM_RESTART_COUNT": "2"})
    assert ended.status == 2
    assert "1 starts in a row began at step 3" in ended.err


def replace_in_start(folder: Path, old: str, new: str) -> None:
    """As if the first start had been written so: its noted sha256 is the new file's."""
    start = folder / "starts" / "001.yaml"
    start.write_text(start.read_text().replace(old, new))
    add_sums(folder, "starts/001.yaml")


def test_a_job_put_back_before_it_ever_trained_keeps_its_own_overrides(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    first, second = {"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}
    assert train(folder, "training.steps=2", variables=first)[0].status == 0
    assert train(folder, "training.steps=3", variables=second)[0].status == 0
    assert "job: '8'" in (folder / "starts" / "002.yaml").read_text()
    (again,) = train(folder, "training.steps=4", variables=second)
    assert again.status == 0 and "has its 3 steps: nothing to do" in again.out, "it has trained: its start is frozen"
    link = {"SLURM_JOB_ID": "9", "SLURM_RESTART_COUNT": "0", "GPT4MOE_CHAIN_LINK": "1", "GPT4MOE_CHAIN_JOBS": " 8"}
    (again,) = train(folder, "training.steps=4", variables=link)
    assert "has its 3 steps: nothing to do" in again.out, "a chain is one job"


def test_a_start_that_dies_while_the_model_is_built_is_counted(tmp_path: Path, whole_run: Path) -> None:
    folder = tmp_path / "x"
    keys = ("resilience.max_stuck_starts=1", "training.steps=12", f"checkpoint.load={whole_run}")
    (died,) = run_ranks(1, dying_rank, [*SMALL, f"run.root={tmp_path}", "run.name=x", *keys])
    assert died == "out of memory"
    assert "first_step: 11" in (folder / "starts" / "001.yaml").read_text()
    start, left, stop = read_events(folder / "events.jsonl")
    assert (start["event"], start["resumed_step"]) == ("start", 10), "its time is accounted for too"
    assert (left["event"], left["reason"], left["step"], left["is_error"]) == ("stop", "SIGUSR2", 10, False)
    assert (stop["event"], stop["reason"], stop["step"], stop["is_error"]) == ("stop", "MemoryError", 10, True)
    (ended,) = train(folder, *keys, variables={"SLURM_RESTART_COUNT": "1"})
    assert ended.status == 2
    assert "1 starts in a row began at step 11" in ended.err


def dying_rank(environment: Environment, arguments: list[str]) -> str:
    """While its model is built, it is about to end for a signal, and dies in earnest."""
    from gpt4moe import train
    from gpt4moe.training import build

    def build_model(*_: object, **__: object) -> None:
        train.signals.before_leaving("SIGUSR2")
        raise MemoryError("out of memory")

    build.build_model = build_model
    try:
        return str(run_rank(environment, arguments, (), {}))
    except MemoryError as error:
        return str(error)
