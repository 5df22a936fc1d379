"""Prefetch: the same batches in the same order as without a thread, one step ahead; errors and ends of the thread."""

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from gpt4moe.data.batch import Batch
from gpt4moe.data.loader import SampleStream
from gpt4moe.data.prefetch import Prefetch
from gpt4moe.data.samples import MockSamples
from gpt4moe.errors import DataError

CPU = torch.device("cpu")
STREAM = SampleStream(MockSamples(vocab_size=64, seq_length=16, seed=1), vocab_size=64)
PATIENCE = 60.0


def make(consumed: int) -> list[Batch]:
    return STREAM.micro_batches(consumed, global_batch_size=4, micro_batch_size=2, dp=1, dp_index=0)


class Noted:
    """make, and what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.threads: set[str] = set()
        self.has_begun = {number: threading.Event() for number in range(0, 40, 4)}

    def __call__(self, consumed: int) -> list[Batch]:
        self.asked.append(consumed)
        self.threads.add(threading.current_thread().name)
        self.has_begun[consumed].set()
        return make(consumed)


@pytest.fixture
def noted() -> Noted:
    return Noted()


@pytest.fixture
def prefetch(noted: Noted) -> Iterator[Prefetch]:
    it = Prefetch(noted, CPU)
    yield it
    it.close()


def assert_equal(got: list[Batch], wanted: list[Batch]) -> None:
    for one, other in zip(got, wanted, strict=True):
        for name in ("tokens", "labels", "position_ids", "loss_mask", "token_ids", "source_index"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_every_step_gets_its_own_samples_to_the_bit(noted: Noted, prefetch: Prefetch) -> None:
    for consumed in range(0, 20, 4):
        assert_equal(prefetch.take(consumed, following=consumed + 4 if consumed < 16 else None), make(consumed))
    assert noted.asked == [0, 4, 8, 12, 16], "each once, and none after the last step"


def test_the_next_step_s_samples_are_made_while_this_step_runs(noted: Noted, prefetch: Prefetch) -> None:
    prefetch.take(0, following=4)
    assert noted.has_begun[4].wait(PATIENCE)
    assert noted.threads == {"samples_0"}


def test_another_number_than_foretold_gets_its_own_samples(noted: Noted, prefetch: Prefetch) -> None:
    """As after a rewind, or where the batch size changes."""
    prefetch.take(0, following=4)
    assert_equal(prefetch.take(12, following=16), make(12))
    assert_equal(prefetch.take(16, following=None), make(16))


def test_an_error_reaches_the_step_whose_samples_failed_as_it_was(prefetch: Prefetch) -> None:
    error = DataError("shard 3 is damaged.", "Make it again.")

    def failing(consumed: int) -> list[Batch]:
        if consumed == 4:
            raise error
        return make(consumed)

    prefetch.make = failing
    assert_equal(prefetch.take(0, following=4), make(0))
    with pytest.raises(DataError) as raised:
        prefetch.take(4, following=8)
    assert raised.value is error and (error.cause, error.cure) == ("shard 3 is damaged.", "Make it again.")


def test_close_ends_the_thread_even_when_it_has_work() -> None:
    noted = Noted()
    prefetch = Prefetch(noted, CPU)
    prefetch.take(0, following=4)
    prefetch.close()
    assert [thread for thread in threading.enumerate() if thread.name.startswith("samples")] == []
    prefetch.close()


def test_on_a_gpu_batches_are_made_in_pinned_memory_on_the_rank_s_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: calls.append((threading.current_thread().name, device))
    )
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append("pin") or tensor.clone())
    device = torch.device("cuda", 3)
    prefetch = Prefetch(make, device)
    assert_equal(prefetch.take(0, following=None), make(0))
    prefetch.close()
    assert calls == [("samples_0", device)] + ["pin"] * 6 * 2  # tensors x micro-batches


ENDS = """
import os, sys, time, torch
from gpt4moe.data.prefetch import Prefetch
prefetch = Prefetch(lambda n: time.sleep(0.2 * n) or [], torch.device("cpu"))
prefetch.take(0, following=4)
child = os.fork()  # while the thread works: the child has no such thread, and must not wait for it
if child and os.waitpid(child, 0)[1]:
    sys.exit("the child failed")
sys.exit(0)
"""


def test_neither_the_end_of_the_interpreter_nor_a_fork_waits_for_ever() -> None:
    """Without close, as after an error that nobody expected."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", ENDS], check=True, timeout=PATIENCE * 2)
