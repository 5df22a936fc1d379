"""A run that stops, for whatever reason, goes on where it was; its folder tells one story."""

import signal
from pathlib import Path

import pytest
import yaml

from tests.training.command import Event, contents, metrics, saved_state, train

TEN = ("training.steps=10", "checkpoint.every=5", "checkpoint.keep=0")


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in metrics(folder)]


def test_more_steps_go_on_and_equal_a_run_that_never_stopped(tmp_path: Path, whole_run: Path) -> None:
    folder = tmp_path / "x"
    for end in (4, 10):
        (ended,) = train(folder, *TEN, f"training.steps={end}")
        assert ended.status == 0, ended.err
    written = metrics(folder)
    assert written[3].pop("eval_loss") > 0  # the first end was evaluated
    assert written == metrics(whole_run)
    assert saved_state(folder, 10) == saved_state(whole_run, 10) != {}


def test_steps_lost_to_a_kill_are_redone_bit_for_bit_and_written_once(tmp_path: Path, whole_run: Path) -> None:
    folder = tmp_path / "x"
    with pytest.raises(AssertionError, match="died"):
        train(folder, *TEN, events=(Event(after_step=7, sent=signal.SIGKILL),))
    assert metrics(folder) == metrics(whole_run)[:7]
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "lo')
    (ended,) = train(folder, *TEN)
    assert ended.status == 0, ended.err
    assert "resume after step 5" in ended.out
    assert metrics(folder) == metrics(whole_run)
    assert saved_state(folder, 10) == saved_state(whole_run, 10)


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_a_kill_of_one_rank_of_several_costs_no_step(engine: str, tmp_path: Path) -> None:
    folder, layout = tmp_path / "x", ("parallel.ep=2", f"engine={engine}")
    with pytest.raises(AssertionError, match="rank 1: the process died"):
        train(folder, *TEN, *layout, ranks=2, events=(Event(after_step=7, rank=1, sent=signal.SIGKILL),))
    before = metrics(folder)
    assert before[-1]["step"] in (6, 7)  # the first rank may have died before it wrote its line
    ended = train(folder, *TEN, *layout, ranks=2)
    assert [(each.status, each.err) for each in ended] == [(0, ""), (0, "")]
    assert "DeepSpeed" not in ended[0].out and "WARNING" not in ended[0].out
    assert steps(folder) == list(range(1, 11))
    assert metrics(folder)[: len(before)] == before


def test_a_finished_run_started_again_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    assert train(folder, "training.steps=2")[0].status == 0
    before = contents(folder)
    for overrides in (["training.steps=2"], ["training.steps=1"]):
        (ended,) = train(folder, *overrides)
        assert (ended.status, ended.err) == (0, "")
        assert "nothing to do" in ended.out
        assert contents(folder) == before


def test_layout_micro_batch_and_learning_rate_may_change_and_are_logged(tmp_path: Path, whole_run: Path) -> None:
    folder = tmp_path / "x"
    assert train(folder, "training.steps=5")[0].status == 0
    frozen = (folder / "resolved.yaml").read_bytes()
    changed = ("training.steps=6", "parallel.tp=2", "training.micro_batch_size=2", "optimizer.lr=0.001")
    assert [ended.status for ended in train(folder, *changed, ranks=2)] == [0, 0]

    assert (folder / "resolved.yaml").read_bytes() == frozen
    assert sorted(file.name for file in (folder / "starts").iterdir()) == ["001.yaml", "002.yaml"]
    assert yaml.safe_load((folder / "starts" / "001.yaml").read_text())["changed"] == {}
    second = yaml.safe_load((folder / "starts" / "002.yaml").read_text())
    assert second["changed"] == {
        "parallel.tp": {"was": 1, "is": 2},
        "training.steps": {"was": 5, "is": 6},
        "training.micro_batch_size": {"was": 1, "is": 2},
        "optimizer.lr": {"was": 0.002, "is": 0.001},
    }
    assert second["layout"].startswith("2 ranks")
    same_step = metrics(whole_run)[5]
    # The same weights and samples, added up in another order; the load-balancing loss alone pools a micro-batch.
    assert metrics(folder)[5]["loss"] == pytest.approx(same_step["loss"], abs=1e-5)
    assert metrics(folder)[5]["learning_rate"] == pytest.approx(same_step["learning_rate"] / 2)


def test_a_requeued_job_runs_the_config_of_its_last_start(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    stopped = Event(after_step=2, sent=signal.SIGUSR2)
    job = {"SLURM_JOB_ID": "7"}
    assert train(folder, "optimizer.lr=0.003", events=(stopped,), variables=job)[0].status == 85
    requeued = {"SLURM_RESTART_COUNT": "1", **job}
    assert train(folder, "optimizer.lr=0.5", "training.steps=4", variables=requeued)[0].status == 0
    assert steps(folder) == [1, 2, 3, 4, 5, 6]
    assert {record["learning_rate"] <= 0.003 for record in metrics(folder)} == {True}
    assert yaml.safe_load((folder / "starts" / "002.yaml").read_text())["changed"] == {}


def test_a_requeue_before_the_first_start_runs_the_overrides(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    assert train(folder, "training.steps=1", variables={"SLURM_RESTART_COUNT": "1"})[0].status == 0
    assert steps(folder) == [1]
