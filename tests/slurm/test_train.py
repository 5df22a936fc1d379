"""The trainer itself under slurm/train.sh: four ranks on two nodes of a real Slurm."""

import json
import sys
import time
from pathlib import Path

import pytest

from tests.slurm_lab.cluster import SlurmLab

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "+experiment=tiny", "data=mock", "run.name=x", "tracking.wandb=disabled",
    "model.num_layers=2", "model.hidden_size=32", "model.seq_length=16", "model.vocab_size=64",
    "model.moe.num_experts=4", "model.moe.ffn_hidden_size=16",
    "training.steps=3", "training.global_batch_size=8", "training.eval_every=0", "training.eval_samples=8",
]  # fmt: skip


def submit(slurm: SlurmLab, folder: Path, *overrides: str) -> int:
    return slurm.submit(
        "sbatch", "--nodes=2", "--ntasks-per-node=2", f"--output={folder}/batch.log", "slurm/train.sh",
        *SMALL, f"run.root={folder}", *overrides, cwd=ROOT, GPT4MOE_VENV=sys.prefix,
    )  # fmt: skip


@pytest.mark.slurm
def test_a_job_trains_on_two_nodes_and_writes_every_step_once(slurm: SlurmLab, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "parallel=tp2_pp2_ep2")
    ended = slurm.wait(job, 200)
    log = tmp_path / "x" / "logs" / f"{job}-0.log"
    assert ended["JobState"] == "COMPLETED", log.read_text()
    steps = [json.loads(line)["step"] for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    assert (tmp_path / "x" / "checkpoints" / "step-00000003").is_dir()
    assert (tmp_path / "x" / "resolved.yaml").is_file()


@pytest.mark.slurm
def test_a_layout_that_does_not_fit_ends_with_2_and_one_rank_says_why(slurm: SlurmLab, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "parallel.pp=3")
    assert slurm.wait(job, 200)["ExitCode"] == "2:0"
    cause, cure = (tmp_path / "x" / "logs" / f"{job}-0.log").read_text().splitlines()
    assert "= 3 does not divide the 4 ranks" in cause
    assert "multiple of 3" in cure


@pytest.mark.slurm_long
def test_a_job_that_was_told_to_stop_goes_on_after_its_requeue(slurm: SlurmLab, tmp_path: Path) -> None:
    metrics = tmp_path / "x" / "metrics.jsonl"
    job = submit(slurm, tmp_path, "parallel=tp2_pp2_ep2", "training.steps=60")
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    slurm.call("scancel", "--batch", "--signal=USR1", str(job))
    assert slurm.wait(job, 60, "PENDING", "COMPLETED")["Restarts"] == "1"
    saved = len(metrics.read_text().splitlines())
    assert 5 < saved < 60
    assert (tmp_path / "x" / "checkpoints" / f"step-{saved:08}").is_dir()
    slurm.start_again(job)
    assert slurm.wait(job, 200)["JobState"] == "COMPLETED"
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 61))
    assert (tmp_path / "x" / "logs" / f"{job}-1.log").is_file()
