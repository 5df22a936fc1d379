"""A run that goes back: to a healthy checkpoint, over the samples that led to wrong numbers, and on; kills included."""

import json
import os
import shutil
import signal
from math import nan
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from gpt4moe.checkpoint.retention import committed_steps, latest_saved
from gpt4moe.checkpoint.storage import Piece
from gpt4moe.data.batch import Batch
from gpt4moe.data.command import answer
from gpt4moe.data.loader import SampleStream
from gpt4moe.errors import GoBack
from gpt4moe.parallel.environment import Environment
from gpt4moe.runlog.run_files import drop_sum
from gpt4moe.training import gone_back, loop, saver, update
from gpt4moe.training.state import TrainingContext
from gpt4moe.training.step import StepRunner
from tests.checkpoint.mishap import Mishap, plant
from tests.spawn import run_ranks
from tests.training.command import BATCH, SMALL, Ended, Event, contents, metrics, run_rank, saved_state, train

GO_BACK = (
    "training.steps=8", "checkpoint.every=2", "checkpoint.keep=0", "resilience.on_nonfinite=go_back",
    "resilience.suspect_steps=2", "resilience.pass_over_steps=1",
)  # fmt: skip
BAD = (50,)
"""A sample of step 7. Of the checkpoints before it that of step 6 is suspect, so the run goes back to step 4 and passes
over the samples of steps 5 to 8."""
LAYOUTS = {
    "one": (1, ()),
    "deepspeed": (1, ("engine=deepspeed",)),
    "tp2_pp2": (4, ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2")),
    "deepspeed tp2_ep2": (4, ("engine=deepspeed", "parallel.tp=2", "parallel.ep=2")),
}


def _with_bad_samples(environment: Environment, arguments: list[str], bad: tuple[int, ...], dies: str) -> Ended:
    """A run in which every step that reads one of these samples has a loss that is not a number.

    Args:
        dies: at which moment of going back rank 0 is killed.
    """
    good = update.train_step

    def step(
        runner: StepRunner, number: int, batches: list[Batch], *, policy: update.Policy, **more: Any
    ) -> update.StepOutcome:
        seen = {int(sample) for batch in batches for sample in batch.samples}
        # Every rank of these layouts with dp 2 has other samples.
        first = min(seen) // BATCH * BATCH
        is_bad = any(first <= sample < first + BATCH for sample in bad)

        def judged(numbers: update.StepNumbers, run: Any) -> update.Verdict:
            loss = nan if is_bad else numbers.loss
            return policy(update.StepNumbers(step=numbers.step, loss=loss, grad_norm=numbers.grad_norm), run)

        return good(runner, number, batches, policy=judged, **more)

    def killed(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with patch.object(loop, "train_step", step):
        if not dies:
            return run_rank(environment, arguments, (), {})
        with patch.object(gone_back, dies, killed):
            return run_rank(environment, arguments, (), {})


def _gone_back(
    folder: Path, *overrides: str, ranks: int = 1, bad: tuple[int, ...] = BAD, dies: str = ""
) -> list[Ended]:
    arguments = [*SMALL, f"run.root={folder.parent}", f"run.name={folder.name}", *GO_BACK, *overrides]
    return run_ranks(ranks, _with_bad_samples, arguments, bad, dies)


def _with_a_hung_save(environment: Environment, arguments: list[str], mishap: Mishap) -> Ended:
    plant((mishap,), environment.rank)
    return _with_bad_samples(environment, arguments, BAD, "")


def _with_later_samples(environment: Environment, arguments: list[str], from_sample: int, further: int) -> Ended:
    """A run that is told to read later samples from one on: it knows nothing of going back."""
    good = SampleStream.micro_batches

    def later(stream: SampleStream, consumed_samples: int, **sizes: Any) -> list[Batch]:
        return good(stream, consumed_samples + further * (consumed_samples >= from_sample), **sizes)

    with patch.object(SampleStream, "micro_batches", later):
        return run_rank(environment, arguments, (), {})


def _with_a_save_that_is_not_finite(
    environment: Environment, arguments: list[str], at: int, sent: signal.Signals
) -> Ended:
    """A run that a signal asks to save step `at`, after whose update a weight is infinite; once."""
    done = []

    def refused(pieces: list[Piece], context: TrainingContext) -> None:
        if context.state.step == at and not done:
            done.append(at)
            error = GoBack("a weight is not finite", "lower it")
            error.step = at
            raise error

    with patch.object(saver, "require_finite", refused):
        return run_rank(environment, arguments, (Event(after_step=at - 1, sent=sent),), {})


def _events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [
        it for line in (folder / "events.jsonl").read_text().splitlines() if (it := json.loads(line))["event"] == kind
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_follows_equals_a_run_from_that_checkpoint_with_later_samples(layout: str, tmp_path: Path) -> None:
    ranks, words = LAYOUTS[layout]
    folder, told = tmp_path / "x", tmp_path / "told"
    ended = _gone_back(folder, *words, ranks=ranks)
    assert [rank.status for rank in ended] == [0] * ranks, ended[0].err
    assert "Step 7 has loss nan" in ended[0].out and "goes back to step 4 and passes over 32 samples" in ended[0].out
    assert [record["step"] for record in metrics(folder)] == list(range(1, 9))

    shutil.copytree(folder, told)
    for file in ("gone_back.json", "events.jsonl"):
        (told / file).unlink()
    drop_sum(told, "gone_back.json")  # else its loss would be refused
    for step in ("left-step-00000006", "step-00000006", "step-00000008"):
        shutil.rmtree(told / "checkpoints" / step, ignore_errors=True)  # the next save removes what was left
    plain = [*SMALL, f"run.root={tmp_path}", "run.name=told", *GO_BACK, "resilience.on_nonfinite=stop", *words]
    again = run_ranks(ranks, _with_later_samples, plain, 32, 32)
    assert [rank.status for rank in again] == [0] * ranks, again[0].err
    assert metrics(told) == metrics(folder)
    assert saved_state(told, 8) == saved_state(folder, 8) != {}


@pytest.fixture(scope="module")
def gone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went back once, on one rank."""
    folder = tmp_path_factory.mktemp("gone") / "x"
    (ended,) = _gone_back(folder)
    assert ended.status == 0, ended.err
    return folder


def test_the_run_tells_what_it_passed_over(gone: Path) -> None:
    manifest = json.loads((gone / "checkpoints" / "step-00000008" / "manifest.json").read_text())
    assert (manifest["consumed_samples"], manifest["passed_over"]) == (64, [[32, 32]])
    assert manifest["consumed_per_source"] == {"mock": 64}
    assert "passed_over" not in json.loads((gone / "checkpoints" / "step-00000004" / "manifest.json").read_text())
    (event,) = _events(gone, "go_back")
    assert (event["step"], event["to_step"], event["samples"]) == (7, 4, 32)
    assert [it["reason"] for it in _events(gone, "stop")] == ["went_back", "finished"]
    assert [(it["resumed_step"], it["redone_steps"]) for it in _events(gone, "start")] == [(0, 0), (4, 2)]
    assert len(list((gone / "starts").iterdir())) == 1, "it was one launch"
    named = [*SMALL, f"run.root={gone.parent}", f"run.name={gone.name}"]
    reads = [answer("step", [str(step), *named]).facts["first_sample"] for step in (4, 5, 6)]
    assert reads == [24, 64, 72]


@pytest.mark.parametrize("dies", ["sync_folder", "set_aside"])
def test_a_kill_while_it_goes_back_changes_nothing(dies: str, gone: Path, tmp_path: Path) -> None:
    """Right after the decision, and before the checkpoints that it went back from are renamed."""
    folder = tmp_path / "x"
    with pytest.raises(AssertionError, match="died"):
        _gone_back(folder, dies=dies)
    assert (folder / "checkpoints" / "step-00000006").exists() and (folder / "gone_back.json").exists()
    (ended,) = train(folder, *GO_BACK)  # without the bad sample: that it is passed over must not hang on it
    assert ended.status == 0, ended.err
    assert metrics(folder) == metrics(gone) and saved_state(folder, 8) == saved_state(gone, 8)
    assert len(json.loads((folder / "gone_back.json").read_text())["times"]) == 1


def test_a_run_cut_after_it_went_back_goes_on_as_one_that_was_not(gone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    assert _gone_back(folder, "training.steps=7")[0].status == 0
    assert train(folder, *GO_BACK)[0].status == 0
    assert saved_state(folder, 8) == saved_state(gone, 8)


def test_a_signal_ends_the_run_also_where_its_save_goes_back(tmp_path: Path) -> None:
    arguments = [*SMALL, f"run.root={tmp_path}", "run.name=x", *GO_BACK]
    (ended,) = run_ranks(1, _with_a_save_that_is_not_finite, arguments, 5, signal.SIGTERM)
    assert ended.status == 85, ended.err
    assert [it["reason"] for it in _events(tmp_path / "x", "stop")] == ["SIGTERM"]
    waits = [it for it in _events(tmp_path / "x", "pause") if it["what"] == "checkpoint"]
    assert len(waits) == len(_events(tmp_path / "x", "checkpoint")) == 3
    assert latest_saved(tmp_path / "x") == 2


def test_a_save_that_was_asked_for_and_goes_back_is_made_after_the_next_step(tmp_path: Path) -> None:
    arguments = [*SMALL, f"run.root={tmp_path}", "run.name=x", *GO_BACK, "training.steps=6", "checkpoint.every=4"]
    (ended,) = run_ranks(1, _with_a_save_that_is_not_finite, arguments, 5, signal.SIGUSR1)
    assert ended.status == 0, ended.err
    assert ended.out.count("SIGUSR1 received: saving step 5") == 2, "the run goes back to step 4 in between"
    assert committed_steps(tmp_path / "x" / "checkpoints") == [4, 5, 6]


def test_a_save_that_hangs_while_the_run_goes_back_lets_no_other_write_into_its_folder(tmp_path: Path) -> None:
    """Its thread would truncate the new file of step 6."""
    held = Mishap(save=3, until=(tmp_path / "x" / "metrics.jsonl", 8), stall_seconds=1)
    more = ("training.steps=14", "checkpoint.on_save_failure=go_on", "checkpoint.max_failed_saves=100")
    arguments = [*SMALL, f"run.root={tmp_path}", "run.name=x", "checkpoint.asynchronous=true", *GO_BACK, *more]
    (ended,) = run_ranks(1, _with_a_hung_save, arguments, held)
    assert ended.status == 0 and "goes back to step 4" in ended.out, ended.err
    failed = [it["text"] for it in _events(tmp_path / "x", "alert") if it["name"] == "failed save"]
    assert "step-00000006 could not be saved: the disk has not answered" in failed[0]
    assert failed[1].startswith("Step 6 could not be saved: the disk still does not answer to the save of ")
    steps = committed_steps(tmp_path / "x" / "checkpoints")
    assert 6 not in steps and steps[-1] == 14


def test_a_run_from_a_checkpoint_that_passed_over_samples_says_what_its_steps_read(gone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "y"
    assert train(folder, *GO_BACK, "training.steps=9", f"checkpoint.load={gone}")[0].status == 0
    named = [*SMALL, "training.steps=9", f"run.root={tmp_path}", "run.name=y"]
    assert answer("step", ["9", *named]).facts["first_sample"] == 96


def test_wrong_numbers_for_ever_end_the_run_after_max_go_backs(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    words = ("resilience.max_go_backs=2", "resilience.pass_over_steps=0")
    (ended,) = _gone_back(folder, *words, bad=tuple(range(48, 4800)))
    assert ended.status == 1
    cause, cure = ended.err.splitlines()
    assert "gone back 2 times in a row, at last to step 2" in cause and "resilience.max_go_backs" in cure
    record = json.loads((folder / "gone_back.json").read_text())
    assert [(it["step"], it["to_step"], it["samples"]) for it in record["times"]] == [(7, 4, 24), (5, 2, 48)]
    assert record["passed_over"] == [[16, 48]], "step 4 was too close before step 5 of the second time"
    before = contents(folder / "checkpoints")
    (again,) = _gone_back(folder, *words, bad=tuple(range(48, 4800)))
    assert again.status == 1 and "gone back 2 times in a row" in again.err
    assert contents(folder / "checkpoints") == before


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    (ended,) = _gone_back(tmp_path / "x", bad=(9,))
    assert ended.status == 1 and "no checkpoint to go back to" in ended.err and "Step 2 has loss nan" in ended.err


def test_a_going_back_to_a_damaged_checkpoint_goes_further_back(tmp_path: Path) -> None:
    """The steps up to the damaged one are taken again with the samples that they had."""
    folder, whole = tmp_path / "x", tmp_path / "whole"
    assert train(folder, *GO_BACK, "training.steps=6")[0].status == 0
    shutil.copytree(folder, whole)
    file = folder / "checkpoints" / "step-00000004" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for run in (folder, whole):
        (ended,) = _gone_back(run)
        assert ended.status == 0, ended.err
    assert (folder / "checkpoints" / "damaged-step-00000004").exists()
    assert saved_state(folder, 4) == saved_state(whole, 4) and saved_state(folder, 8) == saved_state(whole, 8)
