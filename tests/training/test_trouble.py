"""What goes wrong in the middle of things: the run ends in order, or goes on; nothing saved is lost."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt4moe.errors import LaunchError
from gpt4moe.training import resume
from tests.training.command import Event, contents, metrics, saved_state, train

TEN = ("training.steps=10", "checkpoint.every=5", "checkpoint.keep=0")


def test_a_loss_that_is_not_finite_stops_every_rank_and_a_better_rate_goes_on(tmp_path: Path, whole_run: Path) -> None:
    folder = tmp_path / "x"
    assert train(folder, *TEN, "training.steps=5")[0].status == 0
    saved = contents(folder / "checkpoints")
    ended = train(folder, *TEN, "optimizer.lr=1e30", "parallel.tp=2", "resilience.suspect_steps=0", ranks=2)
    assert [rank.status for rank in ended] == [1, 1]
    cause, cure = ended[0].err.splitlines()
    assert "Step 7 has loss" in cause and "nan" in cause and "optimizer.lr=1e+30" in cure
    assert ended[1].err == ""
    assert contents(folder / "checkpoints") == saved
    assert metrics(folder)[-1]["step"] == 6

    assert train(folder, *TEN)[0].status == 0
    written = metrics(folder)
    assert written[4].pop("eval_loss") > 0
    assert written == metrics(whole_run)
    assert saved_state(folder, 10) == saved_state(whole_run, 10)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    """The numbers of a step come before its update: the loss of step 1 and its gradient norm are finite."""
    folder, words = tmp_path / "x", ("optimizer.lr=1e39", "schedule.warmup_steps=0", "checkpoint.every=1")
    ended = train(folder, *words, "parallel.pp=2", ranks=2)
    assert [rank.status for rank in ended] == [1, 1]
    cause, cure = ended[0].err.splitlines()
    assert "After the update of step 1, weight/" in cause and "not finite; nothing was saved" in cause
    assert "optimizer.lr=1e+39" in cure and ended[1].err == ""
    assert not list(folder.glob("checkpoints/*")) and [record["step"] for record in metrics(folder)] == [1]


@pytest.mark.parametrize("after_step", [2, 4])  # the next step has a checkpoint, or not
def test_a_disk_that_is_full_for_the_metrics_stops_every_rank_and_no_step_is_lost(
    after_step: int, tmp_path: Path, whole_run: Path
) -> None:
    folder = tmp_path / "x"
    fault = Event(after_step=after_step, fills_disk=True)
    ended = train(folder, *TEN, "parallel.pp=2", ranks=2, events=(fault,))
    assert [rank.status for rank in ended] == [2, 2]
    cause, cure = ended[0].err.splitlines()
    assert cause == f"error: {folder}/metrics.jsonl cannot be written: No space left on device."
    assert "goes on from its last checkpoint" in cure and ended[1].err == ""
    assert [record["step"] for record in metrics(folder)] == list(range(1, after_step + 1))
    assert not saved_state(folder, 5), "no checkpoint is ahead of the metrics"

    assert train(folder, *TEN)[0].status == 0
    assert metrics(folder) == metrics(whole_run)


@pytest.mark.parametrize("blocked", ["wandb_id.txt", "wandb_step.txt"])
def test_tracking_that_fails_does_not_stop_training(blocked: str, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    (folder / blocked).mkdir(parents=True)  # a folder where runlog.wandb_run keeps a file
    (ended,) = train(folder, "tracking.wandb=offline", "training.steps=2")
    assert (ended.status, ended.err) == (0, "")
    assert "training goes on" in ended.out
    assert [record["step"] for record in metrics(folder)] == [1, 2]


def test_a_damaged_metrics_file_is_refused_on_every_rank(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    assert train(folder, "training.steps=2")[0].status == 0
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(lines[0][:-10] + b"\n" + lines[1])
    ended = train(folder, "training.steps=3", "parallel.tp=2", ranks=2)
    assert [rank.status for rank in ended] == [2, 2]
    cause, _ = ended[0].err.splitlines()
    assert "metrics.jsonl: line 1 is not a metrics record" in cause
    assert ended[1].err == ""


def test_the_only_checkpoint_damaged_for_one_rank_is_named_by_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    assert [ended.status for ended in train(folder, "training.steps=2", "parallel.tp=2", ranks=2)] == [0, 0]
    file = folder / "checkpoints" / "step-00000002" / "rank-00001.safetensors"
    _damage(file)
    ended = train(folder, "training.steps=3", "parallel.tp=2", ranks=2)
    assert [rank.status for rank in ended] == [2, 2]
    cause, _ = ended[0].err.splitlines()
    assert str(file) in cause
    assert ended[1].err == ""


def _damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damaged", ["rank-00000.safetensors", "manifest.json"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before(
    damaged: str, tmp_path: Path, whole_run: Path
) -> None:
    folder = tmp_path / "x"
    assert train(folder, *TEN)[0].status == 0
    newest = folder / "checkpoints" / "step-00000010"
    _damage(newest / damaged)
    left = contents(newest)
    (ended,) = train(folder, *TEN, "training.steps=11")
    assert ended.status == 0, ended.err
    aside = newest.with_name("damaged-step-00000010")
    assert f"It is {aside} now. The run goes on from step 5." in ended.out and damaged in ended.out
    assert contents(aside) == left
    assert saved_state(folder, 10) == saved_state(whole_run, 10)
    written = metrics(folder)
    assert [record["step"] for record in written] == list(range(1, 12))
    assert written[:9] == metrics(whole_run)[:9]


def test_damage_that_one_rank_alone_finds_sends_every_rank_back(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    assert train(folder, "training.steps=4", "checkpoint.every=2", "parallel.tp=2", ranks=2)[0].status == 0
    _damage(folder / "checkpoints" / "step-00000004" / "rank-00001.safetensors")
    ended = train(folder, "training.steps=5", "parallel.tp=2", ranks=2)
    assert [rank.status for rank in ended] == [0, 0], ended[0].err
    assert "The run goes on from step 2." in ended[0].out
    assert [record["step"] for record in metrics(folder)] == [1, 2, 3, 4, 5]


def test_a_stdout_that_takes_no_more_ends_nothing(tmp_path: Path) -> None:
    (ended,) = train(tmp_path / "x", "training.steps=3", events=(Event(after_step=1, fills_stdout=True),))
    assert (ended.status, ended.err) == (0, "warning: stdout takes no more: No space left on device.\n")
    assert "step 1/3" in ended.out and [record["step"] for record in metrics(tmp_path / "x")] == [1, 2, 3]


def test_no_rank_begins_before_it_sees_the_checkpoint_that_rank_0_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = tmp_path / "step-00000002", tmp_path / "step-00000004"
    for path, text in ((folder, "old"), (seen, "new")):
        path.mkdir()
        (path / "manifest.json").write_text(text)
    wanted, as_seen, glob = resume.as_seen(seen), resume.as_seen, Path.glob
    looks: list[str] = []

    def look(path: Path) -> str:
        if len(looks) == 2:  # the file system shows it at last
            (folder / "manifest.json").write_text("new")
        looks.append(as_seen(path))
        return looks[-1]

    def stale_at_first(path: Path, pattern: str) -> Iterator[Path]:
        if not looks:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return glob(path, pattern)

    with monkeypatch.context() as patch:
        patch.setattr(resume, "as_seen", look)
        patch.setattr(Path, "glob", stale_at_first)
        resume._await_listing(folder, wanted, 3)
    assert len(set(looks)) == 3 and looks[2] == wanted
    (folder / "rank-00000.safetensors").write_bytes(b"one more")
    monkeypatch.setattr(resume, "LISTING_SECONDS", 0.1)
    with pytest.raises(LaunchError, match=r"Rank 3 on .* sees other files in .*step-00000002 than rank 0"):
        resume._await_listing(folder, wanted, 3)
