"""slurm/generate.sh and slurm/evaluate.sh on a real Slurm: around a stand-in that starts at once, and the programs."""

import shutil
from pathlib import Path

import pytest

from tests.slurm_lab.cluster import SlurmLab, until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("generate", "evaluate")


@pytest.fixture
def tools(checkout: Path) -> Path:
    """The checkout, with stand-ins for both programs; its jobs may start twice."""
    (checkout / "tools").mkdir()
    for script in SCRIPTS:
        shutil.copy(ROOT / "tests" / "slurm" / "stand_in.py", checkout / "tools" / f"{script}.py")
    prologue = checkout / "slurm" / "prologue.sh"
    prologue.write_text(prologue.read_text().replace("most_restarts=20", "most_restarts=1"))
    return checkout


@pytest.mark.parametrize(
    ("script", "signal"),
    [
        ("generate", ("--batch", "--signal=USR1")),  # as --signal=B:USR1@60 before the time limit: ranks are killed
        ("evaluate", ("--signal=TERM",)),  # as a preemption: ranks end with 85
    ],
)
def test_a_stopped_job_goes_back_into_the_queue_and_on(
    script: str, signal: tuple[str, ...], slurm: SlurmLab, tools: Path
) -> None:
    arguments = ["signal=85", "--output=answers"]
    job = slurm.submit("bash", f"slurm/{script}.sh", "--nodes=2", "--ntasks=4", *arguments, cwd=tools)
    until(lambda: len(list(tools.glob("pid-*"))) == 4)
    slurm.call("scancel", *signal, str(job))
    assert slurm.wait(job, 40, "PENDING", "FAILED")["Restarts"] == "1", (tools / f"{script}-{job}.log").read_text()
    slurm.start_again(job)
    ended = slurm.wait(job, 60)
    assert (ended["JobState"], ended["NumTasks"], ended["TimeLimit"]) == ("COMPLETED", "4", "00:07:00")
    assert len(list(tools.glob("rank-1-*.json"))) == 4
    assert f"Job {job}, start 1, ended with 0." in (tools / f"{script}-{job}.log").read_text()


def test_a_job_that_dies_again_and_again_is_given_up_and_bad_input_ends_it_at_once(
    slurm: SlurmLab, tools: Path
) -> None:
    dying, wrong = (
        slurm.submit("sbatch", "--ntasks=2", "slurm/generate.sh", f"end={end}", "--output=answers", cwd=tools)
        for end in (-9, 2)
    )
    ended = slurm.wait(wrong, 30)
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0")
    until(lambda: slurm.job(dying)["Restarts"] == "1")
    slurm.wait(dying, 30, "PENDING")
    slurm.start_again(dying)
    ended = slurm.wait(dying, 60)
    log = (tools / f"generate-{dying}.log").read_text()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "137:0", "1"), log
    assert "start 1, ended with 137: rank" in log and "It has started 2 times" in log
    assert not list(tools.glob("*.failed"))


def test_a_cancelled_job_stays_out_of_the_queue(slurm: SlurmLab, tools: Path) -> None:
    job = slurm.submit("sbatch", "--ntasks=1", "slurm/evaluate.sh", "signal=85", "--output=answers", cwd=tools)
    until(lambda: (tools / "pid-0").exists())
    slurm.call("scancel", str(job))
    assert slurm.wait(job, 40)["JobState"] == "CANCELLED"
    assert slurm.job(job)["Restarts"] == "0"


@pytest.mark.parametrize("script", SCRIPTS)
def test_arguments_that_would_lose_work_are_refused_before_a_job_waits(
    script: str, slurm: SlurmLab, tools: Path
) -> None:
    answer = slurm.call("bash", f"slurm/{script}.sh", "--nodes=2", "runs/x", "--tp", "2", cwd=tools)
    assert answer.returncode == 2
    assert answer.stderr.splitlines() == [
        "--output is missing: a stopped job would begin again.", "Add --output answers.jsonl.",
    ]  # fmt: skip
    answer = slurm.call("bash", f"slurm/{script}.sh", "--tp=2", "runs/x", "--output=a", cwd=tools, SLURM_JOB_ID="1")
    assert answer.returncode == 2 and answer.stderr.startswith("--tp=2 came before FOLDER.\n")
