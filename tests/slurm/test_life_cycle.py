"""What befalls a job: preemption, a killed rank, a lost node, scancel, a chain; around a stand-in trainer."""

import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tests.slurm_lab.cluster import SlurmLab, until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]
TWO_BY_TWO = ("sbatch", "--nodes=2", "--ntasks-per-node=2")


def waiting_job(slurm: SlurmLab, checkout: Path, *options: str, ranks: int = 4) -> int:
    """A job whose ranks all wait for a signal, which they answer with 85."""
    job = slurm.submit(*(options or TWO_BY_TWO), "slurm/train.sh", "run.name=x", "signal=85", cwd=checkout)
    until(lambda: len(list(checkout.glob("pid-*"))) == ranks)
    return job


def goes_on(slurm: SlurmLab, checkout: Path, job: int) -> None:
    """The job is in the queue again, and its second start ends well."""
    assert slurm.wait(job, 60, "PENDING")["Restarts"] == "1"
    slurm.start_again(job)
    assert slurm.wait(job, 90)["JobState"] == "COMPLETED"
    assert len(list(checkout.glob("rank-1-*.json"))) == 4


def test_usr1_by_hand_reaches_every_rank_and_the_job_goes_on(slurm: SlurmLab, checkout: Path) -> None:
    job = waiting_job(slurm, checkout)
    slurm.call("scancel", "--signal=USR1", str(job))
    until(lambda: len(list(checkout.glob("saved-0-*"))) == 4)
    # As a preemption does where the site lets it tell the batch shell too: no cancellation.
    slurm.call("scancel", "--batch", "--signal=TERM", str(job))
    time.sleep(1)
    assert slurm.job(job)["JobState"] == "RUNNING"
    assert (checkout / f"runs/x/logs/{job}-0.end").read_text().startswith("running")
    slurm.call("scancel", str(job))


def test_a_cancelled_job_saves_and_is_not_put_back(slurm: SlurmLab, checkout: Path) -> None:
    job = waiting_job(slurm, checkout)
    slurm.call("scancel", str(job))
    until(lambda: len(list(checkout.glob("left-0-*"))) == 4)
    ended = slurm.wait(job, 60)
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("CANCELLED", "0", "85:0")


def test_a_rank_killed_by_the_system_puts_the_job_back(slurm: SlurmLab, checkout: Path) -> None:
    job = waiting_job(slurm, checkout)
    for rank in (1, 0, 2, 3):  # in the real trainer the others end by the broken connection
        os.kill(int((checkout / f"pid-{rank}").read_text()), signal.SIGKILL if rank == 1 else signal.SIGTERM)
    goes_on(slurm, checkout, job)


def test_a_preempted_job_saves_within_its_grace_and_goes_on(slurm: SlurmLab, checkout: Path) -> None:
    job = waiting_job(slurm, checkout)
    urgent = slurm.submit(
        "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 2", f"--output={checkout}/urgent.log",
        cwd=checkout,
    )  # fmt: skip
    assert slurm.wait(urgent, 60)["JobState"] == "COMPLETED"
    goes_on(slurm, checkout, job)


@pytest.mark.slurm_long
def test_a_lost_node_puts_the_job_back(slurm: SlurmLab, checkout: Path) -> None:
    job = waiting_job(slurm, checkout)
    slurm.call("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    try:
        assert slurm.wait(job, 60, "PENDING")["Restarts"] == "1"
    finally:
        slurm.call("scontrol", "update", "nodename=node2", "state=resume")
    assert (checkout / f"runs/x/logs/{job}-0.end").read_text().startswith(("queued", "again")), "no link would stop"
    goes_on(slurm, checkout, job)


@pytest.mark.slurm_long
def test_the_time_limit_comes_with_a_warning_and_the_job_goes_on(slurm: SlurmLab, checkout: Path) -> None:
    job = waiting_job(slurm, checkout, *TWO_BY_TWO, "--time=1", "--signal=B:USR1@40")
    goes_on(slurm, checkout, job)


@pytest.mark.slurm_long
def test_a_time_limit_without_a_warning_saves_too_where_killwait_is_long_enough(
    slurm: SlurmLab, checkout: Path
) -> None:
    job = waiting_job(slurm, checkout, *TWO_BY_TWO, "--time=1", "--signal=B:CONT@10")
    until(lambda: len(list(checkout.glob("left-0-*"))) == 4, 130)
    goes_on(slurm, checkout, job)


def test_a_chain_runs_its_jobs_one_after_the_other(slurm: SlurmLab, checkout: Path) -> None:
    jobs = chain(slurm, checkout)
    ends = [slurm.wait(job, 60) for job in jobs]
    assert [ended["JobState"] for ended in ends] == ["COMPLETED"] * 3
    for before, after in pairwise(ends):
        assert before["EndTime"] <= after["StartTime"]


def test_a_chain_ends_with_a_cancelled_link(slurm: SlurmLab, checkout: Path) -> None:
    first, second, third = chain(slurm, checkout, "signal=85")
    until(lambda: (checkout / "pid-0").exists())
    slurm.call("scancel", str(second))  # still waiting, while the first one trains
    until(lambda: slurm.job(third)["JobState"] == "FAILED")
    assert f"The chain ends here: job {second} was cancelled." in (checkout / f"slurm-{third}.log").read_text()
    assert slurm.job(first)["JobState"] == "RUNNING"
    slurm.call("scancel", str(first))
    until(lambda: (checkout / "left-0-0").exists())
    slurm.wait(first, 30)
    assert (checkout / f"runs/x/logs/{first}-0.end").read_text() == f"stop 0 job {first} was cancelled\n"
    assert not list((checkout / "runs/x/logs").glob(f"{third}-0.log")), "no rank of it was started"


def test_a_chain_ends_with_a_link_that_fails(slurm: SlurmLab, checkout: Path) -> None:
    first, second, third = chain(slurm, checkout, "end=2")
    assert [slurm.wait(job, 30)["ExitCode"] for job in (first, second, third)] == ["2:0"] * 3
    for job in (second, third):
        told = (checkout / f"slurm-{job}.log").read_text()
        assert f"The chain ends here: job {first} ended with 2." in told


def chain(slurm: SlurmLab, checkout: Path, *overrides: str) -> list[int]:
    """Three jobs of one rank, each after the one before."""
    answer = slurm.call("bash", "slurm/train.sh", "--chain=3", "--ntasks=1", "run.name=x", *overrides, cwd=checkout)
    jobs = [int(line.split()[-1]) for line in answer.stdout.splitlines()]
    assert len(jobs) == 3, answer.stderr
    return jobs
