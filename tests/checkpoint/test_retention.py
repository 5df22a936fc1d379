"""Which checkpoints stay; what is half written or half removed is none."""

import shutil
from pathlib import Path

import pytest

from gpt4moe.checkpoint.manifest import NAME
from gpt4moe.checkpoint.retention import KEEP, committed_steps, find_checkpoint, keep_for, prune, step_folder
from gpt4moe.errors import CheckpointError


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Of steps 10, 20 ... 60."""
    for step in range(10, 70, 10):
        folder = step_folder(tmp_path / "checkpoints", step)
        folder.mkdir(parents=True)
        (folder / NAME).touch()
        (folder / "rank-00000.safetensors").touch()
    return tmp_path / "checkpoints"


@pytest.mark.parametrize(
    ("keep", "keep_every", "stay"),
    [
        (2, 0, [50, 60]),
        (1, 0, [60]),
        (2, 30, [30, 50, 60]),
        (1, 20, [20, 40, 60]),
        (9, 0, [10, 20, 30, 40, 50, 60]),
        (0, 0, [10, 20, 30, 40, 50, 60]),
        (0, 20, [10, 20, 30, 40, 50, 60]),
    ],
)
def test_the_newest_and_every_mth_stay(checkpoints: Path, keep: int, keep_every: int, stay: list[int]) -> None:
    removed = prune(checkpoints, keep=keep, keep_every=keep_every)
    assert committed_steps(checkpoints) == stay
    assert sorted([*removed, *stay]) == [10, 20, 30, 40, 50, 60]
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"step-{step:08d}" for step in stay]


def test_what_another_run_stands_on_stays(checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    for run in ("a", "b", "a"):
        keep_for(step_folder(checkpoints, 20), Path(f"/runs/{run}"))
    assert prune(checkpoints, keep=1, keep_every=0) == [10, 30, 40, 50]
    assert committed_steps(checkpoints) == [20, 60]
    assert (step_folder(checkpoints, 20) / KEEP).read_text() == "/runs/a\n/runs/b\n"
    keep_for(checkpoints / "gone", Path("/runs/a"))
    assert "cannot be marked as needed (No such file or directory)" in caplog.text


def test_a_folder_half_removed_is_no_checkpoint_and_goes_the_next_time(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        prune(checkpoints, keep=5, keep_every=0)
    assert step_folder(checkpoints, 10).exists()
    assert committed_steps(checkpoints) == [20, 30, 40, 50, 60]
    assert prune(checkpoints, keep=5, keep_every=0) == []
    assert not step_folder(checkpoints, 10).exists()


def test_a_folder_that_cannot_be_removed_does_not_stop_the_run(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refused)
    prune(checkpoints, keep=5, keep_every=0)
    assert "step-00000010 cannot be removed" in caplog.text


def test_other_peoples_folders_are_left_alone(checkpoints: Path) -> None:
    for name in ("step-best", "step-00000010-copy", "notes"):
        (checkpoints / name).mkdir()
        (checkpoints / name / NAME).touch()
    prune(checkpoints, keep=1, keep_every=0)
    assert committed_steps(checkpoints) == [60]
    assert {"step-best", "step-00000010-copy", "notes"} < {path.name for path in checkpoints.iterdir()}


def test_a_run_folder_means_its_latest_committed_checkpoint(checkpoints: Path) -> None:
    (step_folder(checkpoints, 60) / NAME).unlink()
    assert find_checkpoint(checkpoints.parent) == step_folder(checkpoints, 50)
    assert find_checkpoint(step_folder(checkpoints, 20)) == step_folder(checkpoints, 20)
    for path in (step_folder(checkpoints, 60), checkpoints.parent / "none"):
        with pytest.raises(CheckpointError, match="neither a step folder nor a run folder"):
            find_checkpoint(path)
