"""One rank's part of a save, in its thread; two ranks here are two threads."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt4moe.checkpoint import saving, writing
from gpt4moe.checkpoint.manifest import NAME
from gpt4moe.checkpoint.reader import CheckpointReader
from gpt4moe.checkpoint.saving import Save, SaveJob, commit, file_name, note_written
from gpt4moe.checkpoint.storage import Piece
from gpt4moe.checkpoint.writing import write_file
from gpt4moe.errors import HUNG
from gpt4moe.training.checkpointing import Staging
from tests.checkpoint.builders import dealt, manifest, piece, state


def job(folder: Path, pieces: list[Piece], rank: int = 0, world_size: int = 1) -> SaveJob:
    return SaveJob(
        folder=folder, pieces=pieces, manifest=manifest(), rank=rank, world_size=world_size, keep=0, keep_every=0
    )


def await_(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def finished(save: Save) -> Save:
    await_(lambda: save.is_done)
    return save


def test_the_first_rank_commits_when_all_have_written(tmp_path: Path) -> None:
    arrays = state()
    hands = dealt(arrays, 2)
    first = Save(job(tmp_path, hands[0], 0, 2))
    time.sleep(0.1)
    assert not first.is_done and not (tmp_path / NAME).exists()
    assert finished(Save(job(tmp_path, hands[1], 1, 2))).problem is None
    assert finished(first).problem is None
    reader = CheckpointReader(tmp_path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(reader.tensor(name).numpy(), array)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        NAME, "rank-00000.safetensors", "rank-00001.safetensors"
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", ["missing", "doubled", "without its moment"])
def test_pieces_that_do_not_cover_every_tensor_once_are_not_committed(tmp_path: Path, wrong: str) -> None:
    array = np.ones((4, 4), dtype=np.float32)
    top, bottom = ((0, 0), (2, 4)), ((2, 0), (2, 4))
    kinds = ["weight", "exp_avg"] + ["exp_avg_sq"] * (wrong != "without its moment")
    pieces = [piece(f"{kind}/a", array, *box) for kind in kinds for box in (top, bottom)]
    extra = {"missing": pieces[:-1], "doubled": [*pieces, piece("weight/a", array, *top)]}
    save = finished(Save(job(tmp_path, extra.get(wrong, pieces))))
    expected = {
        "missing": "8 of 16 elements",
        "doubled": "weight/a@0,0 twice",
        "without its moment": "exp_avg_sq/a: the whole",
    }
    assert expected[wrong] in str(save.problem)
    assert not (tmp_path / NAME).exists()


def test_any_error_of_the_thread_is_told(tmp_path: Path) -> None:
    save = finished(Save(job(tmp_path / "never made", [])))
    assert save.problem is not None and "could not be saved" in save.problem.cause
    assert save.problem.exit_code == 2
    broken = Piece("weight/a", (3,), (0,), (3,), None)  # type: ignore[arg-type]
    problem = finished(Save(job(tmp_path, [broken]))).problem
    assert problem is not None and "NoneType" in problem.cause and "report it" in problem.cure
    assert problem.exit_code == 1, "no input of the user's"


def test_leaving_gives_other_ranks_time_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_PATIENCE_SECONDS", 0.3)
    save = Save(job(tmp_path, [], 0, 2))
    started = time.monotonic()
    save.leave()
    assert 0.3 <= time.monotonic() - started < 5
    assert save.is_done and save.problem is None and not (tmp_path / NAME).exists()


def test_a_save_that_another_rank_failed_is_abandoned_without_a_commit(tmp_path: Path) -> None:
    save = Save(job(tmp_path, [], 0, 2))
    save.abandon()
    assert save.is_done and not (tmp_path / NAME).exists()


def test_a_note_that_never_shows_is_told_once_its_rank_has_ended(tmp_path: Path) -> None:
    save = Save(job(tmp_path, [], 0, 2))
    await_(lambda: save._missing)
    save.job.stall_seconds, save.others_have_ended = 0.05, True
    await_(save.stalled)
    problem = save.stalled()
    assert problem is not None and problem.exit_code == HUNG, "a failover of the disk must not end the run for good"
    assert f"{tmp_path} could not be saved" in problem.cause and "shows no note of rank 1, " in problem.cause
    save.abandon()


def test_a_save_is_abandoned_in_the_midst_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks wait for this one meanwhile."""
    monkeypatch.setattr(writing, "_STREAM_BYTES", 1)  # minutes, were it not interrupted
    values = torch.zeros(10**7)
    save = Save(job(tmp_path, [Piece("weight/a", values.shape, (0,), values.shape, values)], 1, 2))
    await_((tmp_path / file_name(1)).exists)
    assert not save.abandon() and save.is_done and save.problem is None
    assert (tmp_path / file_name(1)).stat().st_size < values.nbytes
    assert [path.name for path in tmp_path.iterdir()] == [file_name(1)], "it does not tell of its file"


def test_a_commit_moves_with_every_file_and_can_be_abandoned_until_its_last_write(tmp_path: Path) -> None:
    moves, ranks = 0, 3
    for rank, pieces in enumerate(dealt(state(), ranks)):
        note_written(tmp_path, rank, write_file(tmp_path / file_name(rank), pieces))

    def moved() -> None:
        nonlocal moves
        moves += 1
        if not list(tmp_path.glob("*.written.json")):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        commit(tmp_path, manifest(), ranks, moved=moved)
    assert moves == 3 * ranks, "for each rank its note read, its header read, its note removed"
    assert not (tmp_path / NAME).exists()


def test_the_removal_of_older_checkpoints_is_no_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removes, may_end = threading.Event(), threading.Event()

    def prune(*_: object, **__: object) -> None:
        removes.set()
        may_end.wait(20)

    monkeypatch.setattr(saving, "prune", prune)
    save = Save(job(tmp_path, dealt(state(), 1)[0]))
    await_(removes.is_set)
    save.job.stall_seconds = 1e-9
    await_(lambda: save.still_seconds > 1e-9)
    assert save.stalled() is None and (tmp_path / NAME).exists()
    may_end.set()
    assert finished(save).problem is None


def test_staged_values_do_not_change_with_their_source_and_the_buffer_is_used_again() -> None:
    source = [torch.arange(6.0), torch.arange(4.0, dtype=torch.bfloat16)]
    pieces = [
        Piece(f"weight/{number}", values.shape, (0,), values.shape, values) for number, values in enumerate(source)
    ]
    staging = Staging()
    staged = staging.copy(pieces)
    place = staging.buffer.data_ptr()
    source[0].zero_()
    assert [part.values.tolist() for part in staged] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3]]
    assert {part.values.dtype for part in staged} == {torch.float32}
    again = staging.copy(pieces)
    assert again[0].values.tolist() == [0] * 6
    assert (staging.buffer.data_ptr(), staging.buffer.numel()) == (place, 10)


class Cuda:
    """torch.cuda's page locks, noted: address -> bytes."""

    def __init__(self, status: int = 0):
        self.status, self.locked = status, dict[int, int]()
        self.waits = 0
        """For the copies from a GPU to be complete."""

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.locked[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


class OnGpu(torch.Tensor):
    """Values that say they lie on a GPU."""

    is_cuda = True


def on_gpu(num_elements: int) -> list[Piece]:
    values = torch.arange(float(num_elements)).as_subclass(OnGpu)
    return [Piece("weight/0", values.shape, (0,), values.shape, values)]


def fake_cuda(patch: pytest.MonkeyPatch, status: int = 0) -> Cuda:
    cuda = Cuda(status)
    patch.setattr(torch.cuda, "cudart", lambda: cuda)

    def synchronize(device: torch.device) -> None:
        cuda.waits += 1

    patch.setattr(torch.cuda, "synchronize", synchronize)
    return cuda


def test_page_locked_memory_takes_the_bytes_asked_for_and_no_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty(pin_memory=True) would take 8 KiB for these 4100 bytes, and 64 GB for 36."""
    cuda, staging = fake_cuda(monkeypatch), Staging()
    for asked in (1025, 1000, 1025):
        staging.copy(on_gpu(asked))
        assert cuda.locked == {staging.buffer.data_ptr(): 4 * 1025}
    assert not staging.buffer.is_pinned() and staging.buffer.untyped_storage().nbytes() == 4 * 1025
    assert cuda.waits == 3, "a copy must be complete before the next step changes what it copies"
    staged = staging.copy(on_gpu(3000))
    assert cuda.locked == {staging.buffer.data_ptr(): 4 * 3000}, "the old buffer must be unlocked before it is freed"
    assert staged[0].values.equal(torch.arange(3000.0))
    staging.close()
    assert cuda.locked == {} and staging.buffer.numel() == 0, "a run that goes back has another buffer afterwards"


def test_memory_that_cannot_be_locked_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_cuda(monkeypatch, status=2)
    staging = Staging()
    for asked in (1000, 2000):
        assert staging.copy(on_gpu(asked))[0].values.equal(torch.arange(float(asked)))
    assert "cannot be page-locked" in caplog.text
