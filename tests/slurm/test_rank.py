"""slurm/rank.sh: whose end is noted as the cause, whatever the order in which ranks end; what a rank starts with.
Needs no Slurm."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

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
    "a hang that others saw, then the rank that was killed": ((0, "exit 86"), (0.5, KILL), "137"),
    "a hang, and long after a kill by srun": ((0, "exit 86"), (3.5, KILL), "86"),
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


def _rank(command: str, link: str = "", **variables: str) -> str:
    """What one rank prints that runs `command`."""
    own = {
        name: value for name, value in os.environ.items() if name not in (*CUDA_VARIABLES, "PYTORCH_CUDA_ALLOC_CONF")
    }
    arguments = ["bash", "slurm/rank.sh", link, "bash", "-c", command]
    done = subprocess.run(arguments, cwd=ROOT, env={**own, **variables}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_rank_starts_with_the_variables_that_cuda_reads_once_and_keeps_the_users() -> None:
    shown = " ".join(f"${name}" for name in CUDA_VARIABLES)
    assert _rank(f"echo {shown}") == " ".join(CUDA_VARIABLES.values())
    assert _rank(f"echo {shown}", **dict.fromkeys(CUDA_VARIABLES, "mine")) == "mine mine"
    assert _rank("echo ${PYTORCH_ALLOC_CONF-unset}", PYTORCH_CUDA_ALLOC_CONF="mine") == "unset"


def test_nccl_writes_its_last_collectives_beside_the_logs() -> None:
    show = "echo $TORCH_FR_BUFFER_SIZE $TORCH_NCCL_DUMP_ON_TIMEOUT $TORCH_FR_DUMP_TEMP_FILE"
    assert _rank(show, "logs/41-0.failed") == "2000 1 logs/41-0.nccl_trace_rank_"
    own = {"TORCH_FR_BUFFER_SIZE": "7", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0", "TORCH_FR_DUMP_TEMP_FILE": "/tmp/x"}
    assert _rank(show, "logs/41-0.failed", **own) == "7 0 /tmp/x"


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The variables of a task on a machine of two NUMA nodes, of which GPUs 0 to 3 belong to node 1, as rank.sh sees
    it; programs that say how they were called stand for numactl, taskset and nvidia-smi."""
    allowed = next(
        line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "Cpus_allowed_list" in line
    )
    files = {"devices/system/cpu/online": allowed, "bus/pci/devices/0000:1b:00.0/numa_node": "1"}
    files |= {f"devices/system/node/node{node}/cpulist": f"{8 * node}-{8 * node + 7}" for node in range(2)}
    for name, text in files.items():
        file = tmp_path / "sys" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    smi = '[ "${!#}" -lt 4 ] || exit 1; echo 00000000:1B:00.0'
    bodies = {"numactl": 'echo numactl "$1" "$2"', "taskset": 'echo taskset "$2"', "nvidia-smi": smi}
    for program, body in bodies.items():
        file = tmp_path / program / program
        file.parent.mkdir()
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)
    tools = tmp_path / "tools"  # all that rank.sh calls, but neither numactl nor taskset
    tools.mkdir()
    for program in ("bash", "sed", "find", "wc"):
        (tools / program).symlink_to(shutil.which(program) or "")
    path = f"{tmp_path}/numactl:{tools}"
    return {
        "GPT4MOE_SYS": str(tmp_path / "sys"), "PATH": path, "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "CUDA_VISIBLE_DEVICES": "0,1,2,3",
    }  # fmt: skip


def test_a_rank_stays_on_the_numa_node_of_its_gpu_or_else_of_its_place(machine: dict[str, str]) -> None:
    path, folder = machine["PATH"], Path(machine["GPT4MOE_SYS"]).parent
    placed = {place: _rank("echo free", **{**machine, "SLURM_LOCALID": place}) for place in "03"}
    assert placed == {"0": "numactl --cpunodebind=0 --preferred=0", "3": "numactl --cpunodebind=1 --preferred=1"}
    with_gpus = {**machine, "PATH": f"{folder}/nvidia-smi:{path}"}
    assert _rank("echo free", **with_gpus) == "numactl --cpunodebind=1 --preferred=1"
    for others in ("7", "6,7,8,9"):  # of another node than GPUs 0 to 3
        on_other = _rank("echo free", **{**with_gpus, "CUDA_VISIBLE_DEVICES": others})
        assert on_other == "numactl --cpunodebind=0 --preferred=0"
    listed = {**with_gpus, "SLURM_LOCALID": "0", "CUDA_VISIBLE_DEVICES": "3,7"}
    assert _rank("echo free", **listed) == "numactl --cpunodebind=1 --preferred=1"
    without_numactl = path.replace("/numactl:", "/taskset:")
    assert _rank("echo free", **{**machine, "PATH": without_numactl}) == "taskset 0-7"


def test_a_rank_is_left_where_it_is_bound_already_or_has_the_machine_alone(machine: dict[str, str]) -> None:
    system = Path(machine["GPT4MOE_SYS"]) / "devices/system"
    neither = machine["PATH"].partition(":")[2]
    changes = ({"GPT4MOE_BIND": "no"}, {"SLURM_STEP_TASKS_PER_NODE": "1(x3)"}, {"PATH": neither})
    assert [_rank("echo free", **{**machine, **change}) for change in changes] == ["free"] * len(changes)
    (system / "cpu/online").write_text("0-4095\n")  # Slurm gave this task a part
    assert _rank("echo free", **machine) == "free"
