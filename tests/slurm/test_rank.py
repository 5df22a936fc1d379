"""slurm/rank.sh: whose end is noted as the cause, whatever the order in which ranks end; what a rank starts with.
Needs no Slurm."""

import os
import subprocess
from pathlib import Path

from gpt4moe.parallel.environment import CUDA_VARIABLES

ROOT = Path(__file__).resolve().parents[2]
# How each rank ends and after how many seconds, and the status that must be noted. Consequences, in the order of the
# ends: an error (1, 2) right after a kill; an abort (134) right after an error, or right before.
ABORT = "kill -ABRT $$"
KILL = "kill -KILL $$"
CASES = {
    "an error, then an abort": ((0, "exit 1"), (0.3, ABORT), "1"),
    "an abort, then the error that it comes from": ((0, ABORT), (0.5, "exit 2"), "2"),
    "a kill, then an error": ((0, KILL), (0.3, "exit 1"), "137"),
    "an error, then a kill within moments": ((0, "exit 1"), (0.5, KILL), "137"),
    "an error, then a kill by srun": ((0, "exit 1"), (3.5, KILL), "1"),
    "a kill, then an abort": ((0, KILL), (0.3, ABORT), "137"),
    "an abort, then a kill within moments": ((0, ABORT), (0.5, KILL), "137"),
    "a fault in memory, then an error": ((0, "kill -SEGV $$"), (0.3, "exit 1"), "139"),
    "aborts alone": ((0, ABORT), (0.3, ABORT), "134"),
    "an abort, and long after an error": ((0, ABORT), (3.5, "exit 1"), "134"),
    "saved, then an error": ((0, "exit 85"), (0.3, "exit 1"), "85"),
    "an error while the other ends well": ((0, "exit 0"), (0.3, "exit 1"), "1"),
}


def test_the_cause_of_a_failure_is_noted_and_not_its_consequence(tmp_path: Path) -> None:
    ranks, noted = {}, {}
    for number, (case, (*ends, _)) in enumerate(CASES.items()):
        for rank, (seconds, end) in enumerate(ends):
            command = ["bash", "slurm/rank.sh", f"{tmp_path}/{number}", "bash", "-c", f"sleep {seconds}; {end}"]
            own = {**os.environ, "SLURM_PROCID": str(rank), "SLURMD_NODENAME": "node1"}
            ranks[case, rank] = subprocess.Popen(command, cwd=ROOT, env=own, stderr=subprocess.DEVNULL)
    for process in ranks.values():
        process.wait(30)
    for number, case in enumerate(CASES):
        noted[case] = os.readlink(tmp_path / str(number)).split(":")[0]
    assert noted == {case: expected for case, (*_, expected) in CASES.items()}
    assert os.readlink(tmp_path / "0") == "1: rank 0 on node1"
    assert ranks["a kill, then an error", 0].returncode == 137
    assert ranks["an error, then an abort", 1].returncode == 134


def _rank(command: str, **variables: str) -> str:
    """What one rank prints that runs `command`."""
    own = {
        name: value for name, value in os.environ.items() if name not in (*CUDA_VARIABLES, "PYTORCH_CUDA_ALLOC_CONF")
    }
    arguments = ["bash", "slurm/rank.sh", "", "bash", "-c", command]
    done = subprocess.run(arguments, cwd=ROOT, env={**own, **variables}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_rank_starts_with_the_variables_that_cuda_reads_once_and_keeps_the_users() -> None:
    shown = " ".join(f"${name}" for name in CUDA_VARIABLES)
    assert _rank(f"echo {shown}") == " ".join(CUDA_VARIABLES.values())
    assert _rank(f"echo {shown}", **dict.fromkeys(CUDA_VARIABLES, "mine")) == "mine mine"
    assert _rank("echo ${PYTORCH_ALLOC_CONF-unset}", PYTORCH_CUDA_ALLOC_CONF="mine") == "unset"
