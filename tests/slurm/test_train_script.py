"""slurm/train.sh on a real Slurm, around a stand-in trainer that starts at once."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm_lab.cluster import SlurmLab, until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120)]
ROOT = Path(__file__).resolve().parents[2]


def notes(checkout: Path, start: int = 0) -> list[dict[str, Any]]:
    """What each rank of one start saw, by rank."""
    return [json.loads(file.read_text()) for file in sorted(checkout.glob(f"rank-{start}-*.json"))]


def test_every_task_is_a_rank_and_all_meet_at_one_address(slurm: SlurmLab, checkout: Path) -> None:
    job = slurm.submit(
        "sbatch", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=2", "slurm/train.sh", "run.name=x", "a.b=[1,2]",
        cwd=checkout, RANK="7", WORLD_SIZE="8",
    )  # fmt: skip
    assert slurm.wait(job, 30)["JobState"] == "COMPLETED"
    ranks = notes(checkout)
    environments = [rank["environment"] for rank in ranks]
    assert [rank["argv"] for rank in ranks] == [["run.name=x", "a.b=[1,2]"]] * 4
    assert [variables["SLURM_PROCID"] for variables in environments] == ["0", "1", "2", "3"]
    assert [variables["SLURM_LOCALID"] for variables in environments] == ["0", "1", "0", "1"]
    assert {variables["SLURM_STEP_NUM_TASKS"] for variables in environments} == {"4"}
    assert {variables["SRUN_CPUS_PER_TASK"] for variables in environments} == {"2"}
    # node1 is no DNS name: the address is what lets the ranks meet.
    assert {variables["MASTER_ADDR"] for variables in environments} == {"127.0.0.1"}
    assert len({variables["MASTER_PORT"] for variables in environments}) == 1
    assert not any("RANK" in variables or "WORLD_SIZE" in variables for variables in environments)
    assert (checkout / f"runs/x/logs/{job}-0.log").read_text().count("of start 0") == 4
    told = (checkout / f"slurm-{job}.log").read_text()
    assert "sbatch did not see these defaults of slurm/cluster.env: SBATCH_TIMELIMIT=7." in told
    assert ". slurm/cluster.env before sbatch" in told


def test_outside_a_job_it_submits_itself_with_the_facts_of_the_site(slurm: SlurmLab, checkout: Path) -> None:
    job = slurm.submit(
        "bash", str(checkout / "slurm/train.sh"), "--ntasks=2", "run.name=x", f"+run.root={checkout}/r", cwd=Path("/")
    )
    ended = slurm.wait(job, 30)
    assert (ended["JobState"], ended["NumTasks"], ended["TimeLimit"]) == ("COMPLETED", "2", "00:07:00")
    assert (checkout / f"r/x/logs/{job}-0.log").exists()
    assert "did not see" not in (checkout / f"slurm-{job}.log").read_text()


def test_a_signal_reaches_every_rank_and_a_saved_run_goes_back_into_the_queue(slurm: SlurmLab, checkout: Path) -> None:
    job = slurm.submit(
        "sbatch", "--nodes=2", "--ntasks-per-node=2", "slurm/train.sh", "run.name=x", "signal=85", cwd=checkout
    )
    deadline = time.monotonic() + 30
    while len(notes(checkout)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    slurm.call("scancel", "--batch", "--signal=USR1", str(job))  # what --signal=B:USR1@120 sends
    assert slurm.wait(job, 30, "PENDING")["Restarts"] == "1"
    slurm.start_again(job)
    assert slurm.wait(job, 60)["JobState"] == "COMPLETED"
    assert [rank["argv"] for rank in notes(checkout, start=1)] == [rank["argv"] for rank in notes(checkout)]
    for start in (0, 1):
        assert (checkout / f"runs/x/logs/{job}-{start}.log").read_text().count(f"of start {start}") == 4


@pytest.mark.parametrize("status", [2, 1, 130])
def test_any_other_status_ends_the_job(slurm: SlurmLab, checkout: Path, status: int) -> None:
    job = slurm.submit("sbatch", "--ntasks=2", "slurm/train.sh", "run.name=x", f"end={status}", cwd=checkout)
    ended = slurm.wait(job, 30)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", f"{status}:0", "0")
    assert (checkout / f"runs/x/logs/{job}-0.end").read_text().startswith("stop"), "a chain ends here too"


def test_a_run_whose_ranks_hung_goes_back_into_the_queue(slurm: SlurmLab, checkout: Path) -> None:
    job = slurm.submit("sbatch", "--ntasks=2", "slurm/train.sh", "run.name=x", "end=86", cwd=checkout)
    until(lambda: slurm.job(job)["Restarts"] == "1")
    assert "ended with 86: rank" in (checkout / f"slurm-{job}.log").read_text()
    assert (checkout / f"runs/x/logs/{job}-0.end").read_text().startswith("queued")
    slurm.call("scancel", str(job))


def test_a_rank_that_fails_while_others_hang_is_no_kill(slurm: SlurmLab, checkout: Path) -> None:
    prologue = checkout / "slurm" / "prologue.sh"
    prologue.write_text(prologue.read_text().replace("--wait=120", "--wait=3"))
    job = slurm.submit("sbatch", "--ntasks=3", "slurm/train.sh", "run.name=x", "end=1", "hang=yes", cwd=checkout)
    ended = slurm.wait(job, 60)
    log = (checkout / f"slurm-{job}.log").read_text()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0"), log
    assert "ended with 1: rank 0 on node1." in log
    assert "Killed" in log or "Exited with exit code 137" in log, "srun killed the others, its own status was 137"


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A small file system without a free block; None where this machine lets nobody mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]).returncode:
        yield None
        return
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_changes_no_status(slurm: SlurmLab, checkout: Path, full_disk: Path | None) -> None:
    root = full_disk or checkout / "runs"
    jobs = {
        status: slurm.submit(
            "sbatch", "--hold", "--ntasks=2", "slurm/train.sh", f"run.root={root}", f"run.name=r{status}",
            f"end={status}", cwd=checkout,
        )
        for status in (0, 2, 85)
    }  # fmt: skip
    for status, job in jobs.items():
        if full_disk is None:  # the nearest thing: notes that cannot be written
            (root / f"r{status}" / "logs" / f"{job}-0.end").mkdir(parents=True)
        slurm.call("scontrol", "release", str(job))
    until(lambda: slurm.job(jobs[85])["Restarts"] == "1")
    slurm.call("scancel", str(jobs[85]))
    for status in (0, 2):
        ended = slurm.wait(jobs[status], 60)
        assert (ended["ExitCode"], ended["Restarts"]) == (f"{status}:0", "0")
    told = (checkout / f"slurm-{jobs[2]}.log").read_text()
    reason = "No space left on device" if full_disk else "Is a directory"
    assert reason in told and "ended with 2: rank" in told, told


def test_a_run_that_dies_by_a_signal_before_it_trains_is_given_up(slurm: SlurmLab, checkout: Path) -> None:
    logs = checkout / "runs" / "x" / "logs"
    logs.mkdir(parents=True)
    (logs / "9999-1.end").write_text("again 1 job 9999 ended with 139\n")  # so did a start of the link before
    job = slurm.submit(
        "sbatch", "--ntasks=2", "slurm/train.sh", "run.name=x", "end=-11", cwd=checkout, GPT4MOE_CHAIN_PREVIOUS="9999"
    )
    until(lambda: slurm.job(job)["Restarts"] == "1")
    slurm.wait(job, 30, "PENDING")
    slurm.start_again(job)
    ended = slurm.wait(job, 60)
    log = (checkout / f"slurm-{job}.log").read_text()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "139:0", "1"), log
    assert "3 starts in a row ended before training began, the last one with 139" in log


def test_a_warning_before_ranks_have_handlers_is_not_lost(slurm: SlurmLab, checkout: Path) -> None:
    script = checkout / "slurm" / "starts.sh"
    script.write_text(script.read_text().replace("sleep 15", "sleep 2"))
    job = slurm.submit("sbatch", "--ntasks=2", "slurm/train.sh", "run.name=x", "signal=85", "late=3", cwd=checkout)
    until(lambda: len(list(checkout.glob("late-*"))) == 2)
    slurm.call("scancel", "--signal=USR1", str(job))  # by hand: it must not kill either
    slurm.call("scancel", "--batch", "--signal=USR1", str(job))
    assert slurm.wait(job, 60, "PENDING")["Restarts"] == "1", (checkout / f"slurm-{job}.log").read_text()
    assert len(list(checkout.glob("left-0-*"))) == 2
    slurm.call("scancel", str(job))


CONTAINER = """#!/bin/sh
[ "$1 $2" = "exec --nv" ] || exit 9
echo "$SLURM_PROCID $3" >"in-$SLURM_PROCID"
shift 4  # python, which is the container's own
exec {python} "$@"
"""


def test_every_rank_runs_in_the_container(slurm: SlurmLab, checkout: Path) -> None:
    wrapper = checkout / "apptainer"
    wrapper.write_text(CONTAINER.format(python=sys.executable))
    wrapper.chmod(0o755)
    with (checkout / "slurm" / "cluster.env").open("a") as site:
        # Words that begin with - before the first other word are srun's, as pyxis wants it.
        site.write('container=(--label "$PWD/apptainer" exec --nv gpt4moe.sif)\n')
    job = slurm.submit("sbatch", "--ntasks=2", "slurm/train.sh", "run.name=x", cwd=checkout)
    assert slurm.wait(job, 30)["JobState"] == "COMPLETED", (checkout / f"slurm-{job}.log").read_text()
    assert sorted(file.read_text() for file in checkout.glob("in-*")) == ["0 gpt4moe.sif\n", "1 gpt4moe.sif\n"]
    lines = (checkout / f"runs/x/logs/{job}-0.log").read_text().splitlines()
    assert sorted(lines) == ["0: rank 0 of start 0", "1: rank 1 of start 0"], "srun's --label"


def test_bad_arguments_are_refused_before_a_job_waits_in_the_queue(slurm: SlurmLab, checkout: Path) -> None:
    answer = slurm.call("bash", "slurm/train.sh", "--nodes=2", "+experiment=tiny", cwd=checkout)
    assert answer.returncode == 2
    assert answer.stderr.splitlines() == ["run.name is not set.", "Add run.name=first."]
    answer = slurm.call("bash", "slurm/train.sh", "--nodes", "2", "run.name=x", cwd=checkout)
    assert answer.returncode == 2
    assert answer.stderr.splitlines() == ["2 is neither an option nor key=value.", "Write --nodes=2, not --nodes 2."]


def test_a_job_from_another_folder_says_where_to_call_sbatch(slurm: SlurmLab, checkout: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    job = slurm.submit("sbatch", str(checkout / "slurm/train.sh"), "run.name=x", cwd=elsewhere)
    assert slurm.wait(job, 30)["ExitCode"] == "2:0"
    assert "Call sbatch in the checkout." in (elsewhere / f"slurm-{job}.log").read_text()


def test_the_header_leaves_nodes_gpus_and_partition_to_the_site() -> None:
    header = [line for line in (ROOT / "slurm/train.sh").read_text().splitlines() if line.startswith("#SBATCH")]
    assert not [line for line in header if any(word in line for word in ("node", "gpu", "gres", "partition", "ntasks"))]
