"""The trainer itself under slurm/train.sh: four ranks on two nodes of a real Slurm."""

import json
import sys
import time
from pathlib import Path

import psutil
import pytest

from gpt4moe.operations.run_status import RunStatus, statuses
from gpt4moe.runlog.metrics_table import TIMINGS
from tests.slurm_lab.cluster import SlurmLab

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "+experiment=tiny", "data=mock", "run.name=x", "tracking.wandb=disabled",
    "model.num_layers=2", "model.hidden_size=32", "model.seq_length=16", "model.vocab_size=64",
    "model.moe.num_experts=4", "model.moe.ffn_hidden_size=16",
    "training.steps=3", "training.global_batch_size=8", "training.eval_every=0", "training.eval_samples=8",
]  # fmt: skip


def submit(slurm: SlurmLab, folder: Path, *overrides: str, options: tuple[str, ...] = ()) -> int:
    return slurm.submit(
        "sbatch", "--nodes=2", "--ntasks-per-node=2", *options, f"--output={folder}/batch.log", "slurm/train.sh",
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


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_killed_rank_and_a_warning_cost_no_step_and_change_no_loss(
    slurm: SlurmLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = tmp_path / "x" / "metrics.jsonl"
    overrides = ("parallel=tp2_pp2_ep2", "training.steps=400", "checkpoint.every=5", "checkpoint.keep=1")
    job = submit(slurm, tmp_path, *overrides)
    wait_for_steps(metrics, 7)
    a_rank(tmp_path).kill()
    assert slurm.wait(job, 120, "PENDING", "COMPLETED", "FAILED")["Restarts"] == "1"
    before = records(metrics)

    slurm.start_again(job)
    wait_for_steps(metrics, len(before) + 3)
    slurm.call("scancel", "--batch", "--signal=USR1", str(job))  # what Slurm sends before the time limit
    assert slurm.wait(job, 120, "PENDING", "COMPLETED", "FAILED")["Restarts"] == "2"
    stopped = records(metrics)
    assert stopped[: len(before)] == before, "redone steps are the same to the bit"
    monkeypatch.setenv("SLURM_CONF", str(slurm.folder / "slurm.conf"))
    waiting = status(tmp_path / "x")
    assert (waiting.state, waiting.job) == ("waiting", job)
    assert waiting.job_state is not None and waiting.job_state.startswith("PENDING")  # its reason comes a moment later
    assert (tmp_path / "x" / "checkpoints" / f"step-{len(stopped):08}").is_dir()

    slurm.start_again(job)
    wait_for_steps(metrics, len(stopped) + 3)
    assert status(tmp_path / "x").job_state == "RUNNING"
    slurm.call("scancel", str(job))
    slurm.wait(job, 120)
    every_second_is_accounted_for(status(tmp_path / "x"), job)
    log = (tmp_path / "x" / "logs" / f"{job}-0.log").read_text()
    assert "\nstep 1/400  loss " in log and "\x1b" not in log, "a log gets plain lines"
    assert [step["step"] for step in records(metrics)] == list(range(1, len(records(metrics)) + 1))
    never_stopped = tmp_path / "y"
    steps = len(stopped) + 3
    job = submit(slurm, tmp_path, *overrides, "run.name=y", f"training.steps={steps}")
    assert slurm.wait(job, 200)["JobState"] == "COMPLETED"
    losses = [step["loss"] for step in records(never_stopped / "metrics.jsonl")]
    assert [step["loss"] for step in records(metrics)][:steps] == losses


def status(folder: Path) -> RunStatus:
    (found,) = statuses([folder])
    return found


def every_second_is_accounted_for(run: RunStatus, job: int) -> None:
    """A rank killed, a warning, a scancel: three starts of one job, and two waits of 3 s and more in the queue."""
    assert (run.job, run.restarts, run.state) == (job, 2, "stopped")
    assert run.account is not None
    first, second, third = run.account.attempts
    assert [start.job for start in (first, second, third)] == [job] * 3
    assert (second.end, third.end, third.resumed_step) == ("SIGUSR2", "SIGTERM", second.last_step)
    assert first.last_step > second.resumed_step and run.account.seconds["redone"] > 0
    assert second.seconds["queue"] > 2 and third.seconds["queue"] > 2
    assert run.account.wall_seconds == pytest.approx(sum(run.account.seconds.values()))
    begun = first.began - first.seconds["queue"]
    assert run.account.wall_seconds == pytest.approx(third.ended - begun, abs=1e-3)
    assert min(run.account.seconds.values()) >= 0, run.account.seconds


def a_rank(folder: Path) -> psutil.Process:
    """One process of the trainer, not the srun that started it."""
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if command[1:3] == ["-m", "gpt4moe.train"] and f"run.root={folder}" in command:
            return process
    raise AssertionError("no rank is running")


def records(metrics: Path) -> list[dict[str, float]]:
    """metrics.jsonl as it stands, without the timings and a line in work."""
    lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


def wait_for_steps(metrics: Path, steps: int) -> None:
    deadline = time.monotonic() + 200
    while not (metrics.exists() and len(records(metrics)) >= steps):
        assert time.monotonic() < deadline
        time.sleep(0.1)
