"""What a run does about a step whose numbers are not finite or far above those before."""

import json
from math import nan
from pathlib import Path
from unittest.mock import patch

import pytest

from gpt4moe.checkpoint.health import reasons
from gpt4moe.checkpoint.retention import healthy_steps
from gpt4moe.config.load import load_run_config
from gpt4moe.config.resilience import MIN_STEPS, Remedy, ResilienceConfig
from gpt4moe.errors import ConfigError
from gpt4moe.parallel.environment import Environment
from gpt4moe.resilience.recent import Recent, centre
from gpt4moe.training import update
from gpt4moe.training.watch import Watch
from tests.spawn import run_ranks
from tests.training.command import SMALL, Ended, metrics, run_rank, saved_state, train

LIMITS = ResilienceConfig(spike_window=32, spike_deviations=6.0)
SKIP = ("training.steps=8", "checkpoint.every=5", "checkpoint.keep=0", "resilience.on_spike=skip")


def _recent(losses: list[float]) -> Recent:
    return Recent(losses=losses, grad_norms=[1.0] * len(losses))


def test_a_spike_is_far_above_the_median_of_the_window_whatever_one_earlier_spike_was() -> None:
    losses = [3.0 + 0.1 * (-1) ** step for step in range(31)] + [40.0]
    middle, deviation = centre(losses, 0.01)
    assert (middle, deviation) == (pytest.approx(3.1), pytest.approx(0.14826 * 2, rel=0.51))
    recent = _recent(losses)
    assert recent.spike(middle + 6.1 * deviation, 1.0, LIMITS) is not None
    assert recent.spike(middle + 5.9 * deviation, 1.0, LIMITS) is None
    assert recent.spike(0.1, 1.0, LIMITS) is None, "a loss that falls is welcome"


def test_equal_losses_do_not_make_a_spike_of_the_last_digit() -> None:
    recent = _recent([3.0] * 20)
    assert recent.spike(3.1, 1.5, LIMITS) is None
    assert "loss 3.3" in str(recent.spike(3.3, 1.0, LIMITS))
    assert "gradient norm 1.7" in str(recent.spike(3.0, 1.7, LIMITS))


def test_before_there_is_a_window_a_loss_of_twice_the_highest_is_a_spike() -> None:
    recent = _recent([5.0, 4.0])
    assert recent.spike(9.9, 1e9, LIMITS) is None and "2.1 times" in str(recent.spike(10.3, 1.0, LIMITS))
    assert Recent().spike(1e6, 1.0, LIMITS) is None


def test_the_window_keeps_the_last_steps_that_were_taken() -> None:
    recent = Recent(skipped_in_a_row=3)
    for step in range(40):
        recent.take(float(step), 1.0, LIMITS.spike_window)
    assert recent.losses == [float(step) for step in range(8, 40)] and recent.skipped_in_a_row == 0


def test_another_length_or_phase_begins_a_new_window() -> None:
    recent = _recent([3.0] * 20)
    recent.begin("a")
    assert recent.losses == [] and recent.spike(3.9, 1.0, LIMITS) is None
    recent.take(3.9, 1.0, LIMITS.spike_window)
    recent.begin("a")
    assert recent.losses == [3.9]


@pytest.mark.parametrize("before", [2, 5])  # 5: of a launch that allowed more
def test_a_stop_names_the_keys_that_let_the_run_go_on(before: int) -> None:
    run = load_run_config([*SMALL, "run.name=x", "resilience.on_spike=skip", "resilience.max_skips=2"])
    watch = Watch(Recent(losses=[3.0], grad_norms=[1.0], skipped_in_a_row=before))
    verdict = watch(update.StepNumbers(step=9, loss=30.0, grad_norm=1.0), run)
    assert verdict.action is update.Action.stop and "resilience.on_spike=go_on" in verdict.cure


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ({"on_nonfinite": Remedy.go_on}, "NaN of every weight"),
        ({"spike_window": MIN_STEPS - 1}, "spike_window=15"),
        ({"spike_deviations": nan}, "spike_deviations=nan"),
        ({"max_skips": 0}, "max_skips=0"),
        ({"go_back_checkpoints": 0}, "go_back_checkpoints=0"),
        ({"suspect_steps": -1}, "suspect_steps=-1"),
    ],
)
def test_limits_that_mean_nothing_are_refused(wrong: dict[str, object], cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        ResilienceConfig(**wrong).validate()


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["checkpoint.every=0"], "no checkpoint to go back to"),
        (["resilience.go_back_checkpoints=4"], "checkpoint.keep=3 leaves fewer"),
        (["training.length_ramp=[{seq_length: 16, until_step: 2}]"], "training.length_ramp"),
    ],
)
def test_going_back_where_it_cannot_work_is_refused(words: list[str], cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        load_run_config([*SMALL, "run.name=x", "checkpoint.every=5", "resilience.on_spike=go_back", *words])


def _with_a_spike(environment: Environment, arguments: list[str]) -> Ended:
    """A run whose policy sees at step 7 a loss fifty times as high."""
    seen = update.StepNumbers

    def numbers(*, step: int, loss: float, grad_norm: float) -> update.StepNumbers:
        return seen(step=step, loss=loss * (50 if step == 7 else 1), grad_norm=grad_norm)

    with patch.object(update, "StepNumbers", numbers):
        return run_rank(environment, arguments, (), {})


def _spiked(folder: Path, *overrides: str, ranks: int = 1) -> list[Ended]:
    arguments = [*SMALL, f"run.root={folder.parent}", f"run.name={folder.name}", *SKIP, *overrides]
    return run_ranks(ranks, _with_a_spike, arguments)


def test_a_spike_is_skipped_alike_on_every_rank_and_after_a_restart(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ranks = _spiked(whole, "parallel.tp=2", ranks=2)
    assert [rank.status for rank in ranks] == [0, 0], ranks[0].err
    assert "step 7: update skipped: a spike: loss" in ranks[0].out
    assert [_spiked(cut, "parallel.tp=2", f"training.steps={n}", ranks=2)[0].status for n in (6, 8)] == [0, 0]
    assert saved_state(cut, 8) == saved_state(whole, 8) != {}
    written = metrics(cut)
    assert written[5].pop("eval_loss") > 0  # where the first launch ended
    assert written == metrics(whole) and [record["step"] for record in written] == list(range(1, 9))
    manifest = json.loads((cut / "checkpoints" / "step-00000008" / "manifest.json").read_text())
    assert (manifest["step"], manifest["optimizer_step"]) == (8, 7)
    assert reasons(cut / "checkpoints" / "step-00000008")[0].startswith("step 7: update skipped: a spike")
    assert healthy_steps(cut / "checkpoints") == [] and healthy_steps(whole / "checkpoints") == []
    assert len(manifest["recent"]["losses"]) == 7 and manifest["recent"]["setting"] == "32 tokens, phase 0"
    events = [json.loads(line) for line in (cut / "events.jsonl").read_text().splitlines()]
    assert [(it["step"], it["action"]) for it in events if it["event"] == "numbers"] == [(7, "skip")]


def test_without_a_remedy_a_spike_is_told_and_changes_nothing(tmp_path: Path, whole_run: Path) -> None:
    folder = tmp_path / "x"
    (ended,) = _spiked(folder, "training.steps=10", "resilience.on_spike=go_on")
    assert ended.status == 0 and "step 7: updated all the same: a spike" in ended.out
    assert saved_state(folder, 10) == saved_state(whole_run, 10)
    assert "recent" not in json.loads((folder / "checkpoints" / "step-00000010" / "manifest.json").read_text())


def test_nan_for_ever_is_skipped_max_skips_times_and_then_stops(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    words = ("optimizer.lr=1e30", "schedule.warmup_steps=0", "resilience.on_nonfinite=skip", "resilience.max_skips=2")
    (ended,) = train(folder, *words)
    assert ended.status == 1 and "the 2 steps before it were skipped too" in ended.err
    assert [record["step"] for record in metrics(folder)] == [1, 2, 3]
