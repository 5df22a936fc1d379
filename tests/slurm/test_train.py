"""The trainer itself under slurm/train.sh: four ranks on two nodes of a real Slurm."""

import json
import sys
from pathlib import Path

import pytest

from tests.slurm_lab.cluster import SlurmLab

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]
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


def test_a_job_trains_on_two_nodes_and_writes_every_step_once(slurm: SlurmLab, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "parallel=tp2_pp2_ep2")
    ended = slurm.wait(job, 200)
    log = tmp_path / "x" / "logs" / f"{job}-0.log"
    assert ended["JobState"] == "COMPLETED", log.read_text()
    steps = [json.loads(line)["step"] for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    assert (tmp_path / "x" / "checkpoints" / "step-00000003").is_dir()
    assert (tmp_path / "x" / "resolved.yaml").is_file()


def test_a_layout_that_does_not_fit_ends_with_2_and_one_rank_says_why(slurm: SlurmLab, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "parallel.pp=3")
    assert slurm.wait(job, 200)["ExitCode"] == "2:0"
    cause, cure = (tmp_path / "x" / "logs" / f"{job}-0.log").read_text().splitlines()
    assert "= 3 does not divide the 4 ranks" in cause
    assert "multiple of 3" in cure
