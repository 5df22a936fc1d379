"""A run whose batch grows: exact over restarts and data-parallel sizes, told in its metrics, part of its identity."""

import signal
from pathlib import Path

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.errors import LayoutError
from gpt4moe.parallel.legality import require_legal
from tests.training.command import SEQ, Event, metrics, saved_state, train

RAMP = "training.batch_ramp=[{global_batch_size: 2, until_samples: 5}, {global_batch_size: 4, until_samples: 14}]"
SIZES = [2, 2, 2, 4, 4, 8, 8, 8]
EIGHT = (RAMP, f"training.steps={len(SIZES)}", "checkpoint.every=2", "checkpoint.keep=0")


@pytest.fixture(scope="module")
def ramped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All eight steps in one go, on one rank."""
    folder = tmp_path_factory.mktemp("runs") / "ramped"
    (ended,) = train(folder, *EIGHT)
    assert ended.status == 0, ended.err
    return folder


def test_metrics_count_the_tokens_of_each_size(ramped: Path) -> None:
    records = metrics(ramped, timings=True)
    assert [record["consumed_tokens"] for record in records] == [
        SEQ * sum(SIZES[: step + 1]) for step in range(len(SIZES))
    ]
    for size, record in zip(SIZES, records, strict=True):
        assert record["tokens_per_second"] * record["step_seconds"] == pytest.approx(size * SEQ)


def test_a_kill_in_the_ramp_costs_no_step_and_no_bit(tmp_path: Path, ramped: Path) -> None:
    folder = tmp_path / "x"
    with pytest.raises(AssertionError, match="died"):
        train(folder, *EIGHT, events=(Event(after_step=5, sent=signal.SIGKILL),))
    (ended,) = train(folder, *EIGHT)
    assert "resume after step 4" in ended.out
    assert metrics(folder) == metrics(ramped)
    assert saved_state(folder, 8) == saved_state(ramped, 8) != {}


def test_a_restart_in_the_ramp_on_another_data_parallel_size_reads_the_same_samples(
    tmp_path: Path, ramped: Path
) -> None:
    folder = tmp_path / "x"
    assert train(folder, *EIGHT, "training.steps=4")[0].status == 0
    assert [ended.status for ended in train(folder, *EIGHT, ranks=2)] == [0, 0]
    for ours, alone in zip(metrics(folder), metrics(ramped), strict=True):
        assert ours["consumed_tokens"] == alone["consumed_tokens"]
        # The same weights and samples, added up in another order.
        assert ours["loss"] == pytest.approx(alone["loss"], abs=1e-5)


def test_another_ramp_is_another_run_and_one_that_the_layout_cannot_have_is_refused(
    tmp_path: Path, ramped: Path
) -> None:
    (ended,) = train(ramped, "training.steps=9")
    assert ended.status == 2
    assert "training.batch_ramp [{'global_batch_size': 2, 'until_samples': 5.0}" in ended.err
    refused = train(tmp_path / "x", *EIGHT, "parallel.pp=2", "training.micro_batch_size=2", ranks=2)
    assert [rank.status for rank in refused] == [2, 2]
    assert "training.batch_ramp[0].global_batch_size=2" in refused[0].err
    assert "Set training.batch_ramp[0].global_batch_size=4" in refused[0].err


def test_a_level_that_is_over_needs_to_fit_no_layout() -> None:
    sizes_of = ["training.global_batch_size=8", "training.micro_batch_size=1", RAMP]
    run = load_run_config(["+experiment=tiny", "data=mock", "run.name=x", *sizes_of])
    after = {steps: run.training.after(steps) for steps in (0, 3, 4, 5)}
    sizes = {steps: [level.global_batch_size for level in one.batch_ramp] for steps, one in after.items()}
    assert sizes == {0: [2, 4], 3: [8, 4], 4: [8, 4], 5: [8, 8]}
    require_legal(run.model, run.parallel, after[5], 8)
    with pytest.raises(LayoutError, match=r"batch_ramp\[1\].global_batch_size=4"):
        require_legal(run.model, run.parallel, after[4], 8)
