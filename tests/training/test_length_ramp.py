"""A run whose samples grow longer: exact over kills, data-parallel sizes and engines, told in its metrics."""

import signal
from pathlib import Path

import pytest

from tests.training.command import BATCH, SEQ, Event, metrics, saved_state, train

RAMP = "training.length_ramp=[{seq_length: 8, until_step: 2, global_batch_size: 32}, {seq_length: 16, until_step: 5}]"
SIZES = [(32, 8)] * 2 + [(BATCH, 16)] * 3 + [(BATCH, SEQ)] * 2
SEVEN = (RAMP, f"training.steps={len(SIZES)}", "checkpoint.every=2", "checkpoint.keep=0", "data.document_mask=true")


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All seven steps in one go, on one rank."""
    folder = tmp_path_factory.mktemp("runs") / "changed"
    (ended,) = train(folder, *SEVEN)
    assert ended.status == 0, ended.err
    return folder


def test_metrics_have_the_length_and_the_tokens_of_each_step(changed: Path) -> None:
    records, consumed = metrics(changed, timings=True), 0
    for (batch, length), record in zip(SIZES, records, strict=True):
        consumed += batch * length
        assert record["seq_length"] == length
        assert record["consumed_tokens"] == consumed
        assert record["tokens_per_second"] * record["step_seconds"] == pytest.approx(batch * length)
    # Of a token, the operations of longer samples are more: attention.
    used = [record["mfu"] / record["tokens_per_second"] for record in records]
    assert used[0] < used[3] < used[6]


def test_a_kill_between_two_changes_costs_no_step_and_no_bit(tmp_path: Path, changed: Path) -> None:
    folder = tmp_path / "x"
    with pytest.raises(AssertionError, match="died"):
        train(folder, *SEVEN, events=(Event(after_step=3, sent=signal.SIGKILL),))
    (ended,) = train(folder, *SEVEN)
    assert "resume after step 2" in ended.out
    assert metrics(folder) == metrics(changed)
    assert saved_state(folder, len(SIZES)) == saved_state(changed, len(SIZES)) != {}


def test_a_restart_on_two_ranks_of_another_engine_reads_the_same_samples(tmp_path: Path, changed: Path) -> None:
    folder = tmp_path / "x"
    assert train(folder, *SEVEN, "training.steps=4")[0].status == 0
    assert [ended.status for ended in train(folder, *SEVEN, "engine=deepspeed", ranks=2)] == [0, 0]
    for ours, alone in zip(metrics(folder), metrics(changed), strict=True):
        assert (ours["consumed_tokens"], ours["seq_length"]) == (alone["consumed_tokens"], alone["seq_length"])
        # The same weights and samples, added up in another order.
        assert ours["loss"] == pytest.approx(alone["loss"], abs=1e-5)


def test_other_lengths_are_another_run_and_those_that_a_layout_cannot_have_are_refused(
    tmp_path: Path, changed: Path
) -> None:
    (ended,) = train(changed, *SEVEN, "training.length_ramp=[]")
    assert ended.status == 2
    assert "training.length_ramp [{'seq_length': 8, 'until_step': 2" in ended.err
    refused = train(tmp_path / "x", *SEVEN, RAMP.replace("seq_length: 8", "seq_length: 2"), "parallel.cp=2", ranks=2)
    assert [rank.status for rank in refused] == [2, 2]
    assert "training.length_ramp[until_step=2].seq_length=2 does not divide by 4" in refused[0].err
    assert "Set it to one of [4, 8, 16]" in refused[0].err
