"""What Slurm tells of a job is read in one file, and means the same to everybody who asks."""

import ast
from pathlib import Path

from gpt4moe.parallel.slurm_job import SlurmJob

ROOT = Path(__file__).resolve().parents[2]


def slurm_variables(source: str) -> list[str]:
    """Strings in the code, docstrings aside, that name a variable of Slurm or of our chains of jobs."""
    strings = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return [
        it for it in strings if isinstance(it, str) and it.startswith(("SLURM_", "GPT4MOE_CHAIN_")) and " " not in it
    ]


def test_one_file_reads_what_slurm_tells() -> None:
    files = {file for file in (ROOT / "gpt4moe").rglob("*.py") if slurm_variables(file.read_text())}
    assert files == {ROOT / "gpt4moe" / "parallel" / "slurm_job.py"}
    assert slurm_variables("import os\njob = os.environ['SLURM_JOB_ID']") == ["SLURM_JOB_ID"], "a planted one is found"


def test_outside_slurm_there_is_no_job_and_no_step() -> None:
    job = SlurmJob.read({})
    assert job == SlurmJob()
    assert (job.number, job.restarts, job.own_jobs, job.is_step) == (None, 0, (None,), False)


def test_a_batch_shell_has_a_job_but_no_step() -> None:
    job = SlurmJob.read({"SLURM_JOB_ID": "41", "SLURM_PROCID": "0"})
    assert (job.number, job.is_step) == (41, False)
    assert SlurmJob.read({"SLURM_JOB_ID": "41", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}).is_step


def test_requeues_and_links_of_a_chain_are_restarts_of_one_job() -> None:
    variables = {"SLURM_JOB_ID": "9", "SLURM_RESTART_COUNT": "2", "GPT4MOE_CHAIN_LINK": "1", "GPT4MOE_CHAIN_JOBS": " 8"}
    job = SlurmJob.read(variables)
    assert (job.restart_count, job.restarts, job.own_jobs) == (2, 3, ("9", "8"))
