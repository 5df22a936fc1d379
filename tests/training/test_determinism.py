"""The same command twice is the same run: every metric but times and every byte of its checkpoint, on CPUs."""

import os
from pathlib import Path

import pytest

from tests.training.command import metrics, saved_state, train

pytestmark = pytest.mark.layouts

LAYOUTS: dict[tuple[int, str], tuple[str, ...]] = {
    (1, "megatron"): (),
    (1, "deepspeed"): (),
    (2, "megatron"): ("parallel.ep=2",),  # over dp, so gradients are summed over ranks
    (2, "deepspeed"): ("parallel.ep=2",),
    (4, "megatron"): ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2"),
    (4, "deepspeed"): ("parallel.tp=2", "parallel.ep=4"),  # tp x dp
}
IN_EVERY_SUITE = [(1, "megatron"), (2, "deepspeed"), (4, "megatron")]
"""`make test-layouts`, which sets LAYOUT_DRAWS, has the others too: each costs two launches."""
CHEAP = ("training.steps=3", "training.eval_samples=0", "model.seq_length=16", "tracking.count_bytes=false")


@pytest.mark.parametrize(("ranks", "engine"), LAYOUTS if "LAYOUT_DRAWS" in os.environ else IN_EVERY_SUITE)
def test_the_same_command_twice_gives_metrics_and_checkpoints_equal_to_the_bit(
    ranks: int, engine: str, tmp_path: Path
) -> None:
    for folder in (tmp_path / "first", tmp_path / "again"):
        ended = train(folder, *CHEAP, f"engine={engine}", *LAYOUTS[ranks, engine], ranks=ranks)
        assert {rank.status for rank in ended} == {0}, ended[0].err
    assert metrics(tmp_path / "first") == metrics(tmp_path / "again")
    assert len(metrics(tmp_path / "first")) == 3
    assert saved_state(tmp_path / "first", 3) == saved_state(tmp_path / "again", 3) != {}
