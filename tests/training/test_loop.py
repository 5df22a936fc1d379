"""The loop's batches are made ahead: nothing of it shows in a checkpoint, in metrics, or after the loop's end."""

import threading
from pathlib import Path
from typing import Any

import pytest

from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks
from tests.training.command import BATCH, SMALL, Ended, metrics, run_rank, saved_state, train

FAILS_IN = 4
"""The step whose samples fail."""


def _with_damaged_data(environment: Environment, arguments: list[str]) -> tuple[Ended, list[str], list[str]]:
    """How the command ends when the samples of one step cannot be read; the threads that are left of the loop, and
    those that made batches of training and of evaluation."""
    from gpt4moe.data.batch import Batch
    from gpt4moe.data.loader import SampleStream
    from gpt4moe.errors import DataError

    good = SampleStream.micro_batches

    made_in: list[str] = []

    def micro_batches(stream: SampleStream, consumed_samples: int, **sizes: Any) -> list[Batch]:
        made_in.append(threading.current_thread().name)
        if consumed_samples == (FAILS_IN - 1) * BATCH:
            raise DataError("shard 3 is damaged.", "Make it again.")
        return good(stream, consumed_samples, **sizes)

    SampleStream.micro_batches = micro_batches  # type: ignore[method-assign,assignment]
    ended = run_rank(environment, arguments, (), {})
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("samples")]
    return ended, left, made_in


@pytest.mark.parametrize("every", [1, 3])
def test_samples_that_cannot_be_read_end_the_run_at_their_step_and_a_restart_goes_on(
    every: int, tmp_path: Path, whole_run: Path
) -> None:
    """Evaluations between the steps read other samples, and leave those made ahead alone."""
    folder, ten = tmp_path / "x", ("training.steps=10", f"checkpoint.every={every}", "checkpoint.keep=0")
    arguments = [*SMALL, f"run.root={tmp_path}", "run.name=x", *ten, "training.eval_every=2"]
    ((ended, left, made_in),) = run_ranks(1, _with_damaged_data, arguments)
    assert ended.status == 2
    cause, cure = ended.err.splitlines()
    assert "shard 3 is damaged." in cause and "Make it again." in cure
    assert left == []
    # Four steps, the evaluation of the second, and perhaps that of the fourth, begun before its samples failed.
    assert made_in in (["samples_0"] * 5, ["samples_0"] * 6)
    assert [record["step"] for record in metrics(folder)] == list(range(1, FAILS_IN))

    (again,) = train(folder, *ten)
    assert again.status == 0, again.err
    assert [{**record, "eval_loss": None} for record in metrics(folder)] == [
        {**record, "eval_loss": None} for record in metrics(whole_run)
    ]
    assert saved_state(folder, 10) == saved_state(whole_run, 10)
