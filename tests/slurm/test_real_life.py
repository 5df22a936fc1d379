"""What befalls a job of the trainer itself, not of a stand-in: afterwards every step is in the metrics exactly once."""

import sys
from pathlib import Path

import pytest

from tests.slurm.test_train import ROOT, SMALL, a_rank, records, submit, wait_for_steps
from tests.slurm_lab.cluster import SlurmLab, until

pytestmark = [pytest.mark.slurm, pytest.mark.slurm_long, pytest.mark.timeout(900)]
KEYS = ("parallel=tp2_pp2_ep2", "training.steps=100000", "checkpoint.every=5", "checkpoint.keep=2")


def put_back(slurm: SlurmLab, job: int, restarts: int) -> None:
    """Waits until Slurm has the job in the queue again, and lets it start."""
    until(lambda: slurm.job(job)["Restarts"] == str(restarts), 120)
    slurm.wait(job, 60, "PENDING")
    slurm.start_again(job)


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(file.parent.name[-8:]) for file in folder.glob("checkpoints/*/manifest.json"))


def test_preemption_a_lost_node_and_the_time_limit_change_no_loss(slurm: SlurmLab, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    metrics = folder / "metrics.jsonl"
    job = submit(slurm, tmp_path, *KEYS, options=("--signal=B:USR1@60",))
    wait_for_steps(metrics, 7)
    urgent = slurm.submit(
        "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 1", "--output=/dev/null", cwd=tmp_path
    )
    assert slurm.wait(urgent, 90)["JobState"] == "COMPLETED"
    preempted = records(metrics)
    assert saved_steps(folder)[-1] == len(preempted), "saved within the grace"
    put_back(slurm, job, 1)

    wait_for_steps(metrics, len(preempted) + 7)
    slurm.call("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    try:
        until(lambda: slurm.job(job)["Restarts"] == "2")
    finally:
        slurm.wait(job, 60, "PENDING")
        slurm.call("scontrol", "update", "nodename=node2", "state=resume")
    lost = records(metrics)
    assert lost[: len(preempted)] == preempted
    put_back(slurm, job, 2)

    wait_for_steps(metrics, len(lost) + 3)
    minutes = int(slurm.job(job)["RunTime"].split(":")[1]) + 2
    slurm.call("scontrol", "update", f"jobid={job}", f"TimeLimit={minutes}")
    until(lambda: slurm.job(job)["Restarts"] == "3", 180)
    limited = records(metrics)
    assert saved_steps(folder)[-1] == len(limited) and limited[: len(lost)] == lost
    slurm.call("scontrol", "update", f"jobid={job}", "TimeLimit=60")
    put_back(slurm, job, 3)

    steps = len(limited) + 3
    wait_for_steps(metrics, steps)
    slurm.call("scancel", str(job))
    slurm.wait(job, 120)
    ended = records(metrics)
    assert [record["step"] for record in ended] == list(range(1, len(ended) + 1))
    job = submit(slurm, tmp_path, *KEYS, "run.name=y", f"training.steps={steps}")
    assert slurm.wait(job, 200)["JobState"] == "COMPLETED"
    never_stopped = records(tmp_path / "y" / "metrics.jsonl")
    assert [record["loss"] for record in ended[:steps]] == [record["loss"] for record in never_stopped]


def test_a_chain_goes_on_after_a_warning_and_a_kill_and_does_each_step_once(slurm: SlurmLab, tmp_path: Path) -> None:
    metrics, steps = tmp_path / "x" / "metrics.jsonl", 1000
    answer = slurm.call(
        "bash", "slurm/train.sh", "--chain=4", "--no-requeue", "--ntasks=1", f"--output={tmp_path}/%j.log", *SMALL,
        f"run.root={tmp_path}", f"training.steps={steps}", "checkpoint.every=20", cwd=ROOT, GPT4MOE_VENV=sys.prefix,
    )  # fmt: skip
    first, second, third, fourth = [int(line.split()[-1]) for line in answer.stdout.splitlines()]
    wait_for_steps(metrics, 30)
    slurm.call("scancel", "--batch", "--signal=USR1", str(first))
    assert slurm.wait(first, 60)["ExitCode"] == "85:0"
    warned = records(metrics)
    wait_for_steps(metrics, len(warned) + 30)
    a_rank(tmp_path).kill()
    assert slurm.wait(second, 60)["ExitCode"] == "137:0"
    assert len(records(metrics)) < steps, "it was killed in the middle"
    assert [slurm.wait(job, 200)["JobState"] for job in (third, fourth)] == ["COMPLETED"] * 2
    ended = records(metrics)
    assert [record["step"] for record in ended] == list(range(1, steps + 1))
    assert ended[: len(warned)] == warned
    assert len(list((tmp_path / "x" / "starts").glob("*.yaml"))) == 3, "the fourth had nothing to do"
