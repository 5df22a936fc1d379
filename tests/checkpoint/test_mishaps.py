"""Whatever happens to a save, the last whole checkpoint stays, and the run goes on from it as if nothing had been."""

import errno
from pathlib import Path

import pytest

from gpt4moe.checkpoint.index import CheckpointIndex
from gpt4moe.checkpoint.retention import committed_steps, step_folder
from gpt4moe.runlog.events_log import read_events
from tests.checkpoint.mishap import COMMIT, NOTE, REMOVAL, RETENTION, WRITE, Mishap, train_with
from tests.training.command import contents, metrics, saved_state, train

SIX = ("training.steps=6", "checkpoint.every=2", "checkpoint.keep=1")


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to; every checkpoint kept."""
    folder = tmp_path_factory.mktemp("runs") / "six"
    (ended,) = train(folder, "training.steps=6", "checkpoint.every=2", "checkpoint.keep=0")
    assert ended.status == 0, ended.err
    return folder


def assert_whole(folder: Path, steps: list[int], like: Path) -> None:
    """Exactly the checkpoints of `steps` are there, and hold what they hold in a run that nothing happened to."""
    assert committed_steps(folder / "checkpoints") == steps
    for step in steps:
        assert list(CheckpointIndex(step_folder(folder / "checkpoints", step)).problems()) == []
        assert saved_state(folder, step) == saved_state(like, step)


@pytest.mark.parametrize(
    ("point", "left"), [(WRITE, [2]), (NOTE, [2]), (COMMIT, [2]), (RETENTION, [2, 4]), (REMOVAL, [4])]
)
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint_to_go_on_from(
    point: str, left: list[int], tmp_path: Path, six_steps: Path
) -> None:
    folder = tmp_path / "x"
    with pytest.raises(AssertionError, match="died"):
        train_with((Mishap(save=2, killed_at=point),), folder, *SIX)
    assert_whole(folder, left, six_steps)

    (again,) = train(folder, *SIX)
    assert again.status == 0, again.err
    assert f"resume after step {left[-1]}" in again.out
    assert_whole(folder, [6], six_steps)
    assert metrics(folder) == metrics(six_steps)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000006"], "leftovers are removed"


def test_a_kill_of_one_rank_of_two_commits_nothing_half(tmp_path: Path) -> None:
    folder, two = tmp_path / "x", (*SIX, "parallel.ep=2")
    with pytest.raises(AssertionError, match="rank 1: the process died"):
        train_with((Mishap(save=2, rank=1, killed_at=WRITE),), folder, *two, ranks=2)
    assert committed_steps(folder / "checkpoints") == [2]
    assert [ended.status for ended in train(folder, *two, ranks=2)] == [0, 0]
    assert committed_steps(folder / "checkpoints") == [6]


@pytest.mark.parametrize(("rank", "asynchronous"), [(0, "true"), (1, "true"), (1, "false")])
def test_a_full_disk_ends_every_rank_with_one_clear_error_and_loses_nothing(
    rank: int, asynchronous: str, tmp_path: Path
) -> None:
    folder, two = tmp_path / "x", (*SIX, "parallel.ep=2", f"checkpoint.asynchronous={asynchronous}")
    ended = train_with((Mishap(save=2, rank=rank, disk_full=True),), folder, *two, ranks=2)
    assert [each.status for each in ended] == [2, 2]
    cause, cure = ended[0].err.splitlines()
    assert "step-00000004 could not be saved" in cause and "No space left on device" in cause
    assert "Earlier checkpoints are whole" in cure
    assert ended[1].err == ""
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert list(CheckpointIndex(step_folder(folder / "checkpoints", 2)).problems()) == []

    assert [each.status for each in train(folder, *two, ranks=2)] == [0, 0]
    assert [record["step"] for record in metrics(folder)] == [1, 2, 3, 4, 5, 6]


GO_ON = ("checkpoint.on_save_failure=go_on", "checkpoint.keep=2")


def test_where_only_a_save_failed_the_run_may_go_on(tmp_path: Path) -> None:
    folder, two = tmp_path / "x", (*SIX, *GO_ON, "parallel.ep=2")
    ended = train_with((Mishap(save=2, rank=1, refused=errno.EROFS),), folder, *two, ranks=2)
    assert [each.status for each in ended] == [0, 0], ended
    assert committed_steps(folder / "checkpoints") == [2, 6], "nothing was pruned for the failed one"
    assert [record["step"] for record in metrics(folder)] == [1, 2, 3, 4, 5, 6]
    (alert,) = [event for event in read_events(folder / "events.jsonl") if event["event"] == "alert"]
    assert alert["name"] == "failed save" and "step-00000004 could not be saved" in alert["text"]
    assert "Read-only file system" in alert["text"] and "1 of 3" in alert["text"] and alert["text"] in ended[0].out


def test_too_many_failed_saves_in_a_row_and_a_failed_last_one_end_the_run(tmp_path: Path) -> None:
    folder, refused = tmp_path / "x", (Mishap(save=2, refused=errno.EDQUOT), Mishap(save=3, refused=errno.EDQUOT))
    (ended,) = train_with(refused, folder, *SIX, *GO_ON, "checkpoint.max_failed_saves=1", "training.steps=9")
    assert ended.status == 2 and "step-00000006 could not be saved" in ended.err
    assert committed_steps(folder / "checkpoints") == [2]

    (ended,) = train_with((Mishap(save=2, refused=errno.ENOSPC),), folder, *SIX, *GO_ON, "training.steps=6")
    assert ended.status == 2 and "step-00000006 could not be saved" in ended.err


def test_a_disk_that_stands_still_has_failed_and_what_it_takes_later_is_no_checkpoint(tmp_path: Path) -> None:
    folder, wakes = tmp_path / "x", 5
    held = Mishap(save=1, until=(folder / "metrics.jsonl", wakes), stall_seconds=1)
    often = ("training.steps=20", "checkpoint.every=1", "checkpoint.max_failed_saves=100", "checkpoint.keep=0")
    (ended,) = train_with((held,), folder, *SIX, *GO_ON, *often)
    assert ended.status == 0, ended.err
    assert "step-00000001 could not be saved: the disk has not answered for " in ended.out
    assert "Step 2 could not be saved: the disk still does not answer to the save of " in ended.out
    saved = committed_steps(folder / "checkpoints")
    assert saved[0] >= wakes and saved[-1] == 20
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {f"step-{step:08d}" for step in saved}


def test_a_failed_background_save_ends_the_run_at_the_next_step_not_at_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    # Enough steps that the thread has failed before the last one.
    (ended,) = train_with((Mishap(save=1, disk_full=True),), folder, *SIX, "training.steps=200", "checkpoint.every=2")
    assert ended.status == 2
    assert "step-00000002 could not be saved" in ended.err
    assert metrics(folder)[-1]["step"] <= 4, "the next save waits, so it is told at step 4 at the latest"


def test_a_checkpoint_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "checkpoints").write_text("a file where the folder should be")
    (ended,) = train(folder, *SIX)
    assert ended.status == 2
    cause, _ = ended.err.splitlines()
    assert "step-00000002 cannot be made" in cause


def test_training_goes_on_while_a_save_is_written_and_what_is_saved_is_the_step_it_is_named_by(
    tmp_path: Path, six_steps: Path
) -> None:
    folder = tmp_path / "x"
    # Step 2's save is held up till the record of step 4 is written; were the loop to wait, neither would ever come.
    held = Mishap(save=1, until=(folder / "metrics.jsonl", 4))
    (ended,) = train_with((held,), folder, *SIX, "checkpoint.keep=0")
    assert ended.status == 0, ended.err
    assert_whole(folder, [2, 4, 6], six_steps)


def test_slow_saves_follow_one_another_and_all_are_whole(tmp_path: Path, six_steps: Path) -> None:
    folder, slow = tmp_path / "x", tuple(Mishap(save=number, seconds=0.2) for number in range(1, 6))
    (ended,) = train_with(slow, folder, "training.steps=6", "checkpoint.every=1", "checkpoint.keep=0")
    assert ended.status == 0, ended.err
    assert committed_steps(folder / "checkpoints") == [1, 2, 3, 4, 5, 6]
    for step in (2, 4, 6):
        assert saved_state(folder, step) == saved_state(six_steps, step)


def test_a_run_that_diverges_finishes_the_save_under_way(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    ended = train_with(
        (Mishap(save=1, seconds=0.5), Mishap(save=1, rank=1, seconds=0.8)), folder,
        "training.steps=6", "checkpoint.every=1", "optimizer.lr=1e30", "schedule.warmup_steps=0", "parallel.tp=2",
        ranks=2,
    )  # fmt: skip
    assert [each.status for each in ended] == [1, 1]
    assert committed_steps(folder / "checkpoints") == [1]


def test_the_end_of_a_run_is_committed_before_the_process_ends(tmp_path: Path) -> None:
    (ended,) = train_with((Mishap(save=1, seconds=0.5),), tmp_path / "x", "training.steps=2")
    assert ended.status == 0
    assert committed_steps(tmp_path / "x" / "checkpoints") == [2]
    assert contents(tmp_path / "x" / "checkpoints").keys() == {
        "step-00000002/manifest.json", "step-00000002/rank-00000.safetensors"
    }  # fmt: skip
