"""One resolver says which rank this is: under torchrun, srun, both or neither."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt4moe.errors import LaunchError
from gpt4moe.parallel.environment import Environment

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
BATCH_SHELL = {"SLURM_JOB_ID": "41", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16"}
SRUN = {
    **BATCH_SHELL, "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "1",
}  # fmt: skip


def place(variables: dict[str, str]) -> tuple[int, int, int, str]:
    found = Environment.detect(variables)
    return found.rank, found.world_size, found.local_rank, found.source


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0, "one process")),
        (TORCHRUN, (5, 8, 1, "torchrun")),
        (SRUN, (3, 4, 1, "srun")),
        (BATCH_SHELL, (0, 1, 0, "one process")),  # it has no step: python in it must not wait for 15 others
        ({**SRUN, **TORCHRUN}, (5, 8, 1, "torchrun")),  # one torchrun a node, started by srun
        ({**SRUN, "SLURM_NTASKS": "16"}, (3, 4, 1, "srun")),  # a step smaller than its job
        ({"LOCAL_RANK": "3", "MASTER_ADDR": "node1"}, (0, 1, 0, "one process")),
    ],
    ids=["nothing", "torchrun", "srun", "batch shell", "torchrun in srun", "small step", "leftovers"],
)
def test_the_launcher_is_recognised(variables: dict[str, str], expected: tuple[int, int, int, str]) -> None:
    assert place(variables) == expected


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({**TORCHRUN, "RANK": "8"}, "RANK=8 WORLD_SIZE=8"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK=-1"),
        ({**TORCHRUN, "WORLD_SIZE": "many"}, "WORLD_SIZE=many"),
        ({**TORCHRUN, "LOCAL_RANK": ""}, "LOCAL_RANK="),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT=http"),
        ({**SRUN, "MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID=3 SLURM_STEP_NUM_TASKS=2"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_STEP_NUM_TASKS"}, "SLURM_STEP_NUM_TASKS=None"),
        ({name: value for name, value in TORCHRUN.items() if name != "MASTER_ADDR"}, "MASTER_ADDR"),
        ({name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"}, "MASTER_PORT"),
    ],
)
def test_contradictions_are_refused_by_name(variables: dict[str, str], named: str) -> None:
    with pytest.raises(LaunchError) as caught:
        Environment.detect(variables)
    assert named in caught.value.cause


def test_one_process_meets_nobody() -> None:
    assert Environment.detect({}).master is None
    assert Environment.detect({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}).master is None


def test_torchrun_says_where_to_meet() -> None:
    assert Environment.detect(TORCHRUN).master == ("node1", 29500)


def test_every_task_of_a_step_finds_the_same_port_and_steps_have_their_own() -> None:
    def port(rank: int, step: int, job: int) -> int:
        variables = {**SRUN, "SLURM_PROCID": str(rank), "SLURM_STEP_ID": str(step), "SLURM_JOB_ID": str(job)}
        master = Environment.detect(variables).master
        assert master is not None and master[0] == "127.0.0.1"
        return master[1]

    assert len({port(rank, 2, 41) for rank in range(4)}) == 1
    ports = [port(0, step, job) for step in range(7) for job in range(1000, 1020)]
    assert len(set(ports)) == len(ports)
    assert all(20000 <= port < 40000 for port in [*ports, port(0, 0, 2**31)])


def test_an_exported_address_wins_over_the_formula() -> None:
    variables = {**SRUN, "SLURM_STEP_NUM_NODES": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert Environment.detect(variables).master == ("10.0.0.1", 1234)


def test_on_several_nodes_the_first_is_the_meeting_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    variables = {**SRUN, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "node[7-8]"}
    master = Environment.detect(variables).master
    assert master is not None and master[0] == "node7"


def test_without_scontrol_the_address_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError) as caught:
        Environment.detect({**SRUN, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "node[7-8]"})
    assert "node[7-8]" in caught.value.cause and "MASTER_ADDR" in caught.value.cure


def test_a_refusing_rank_that_its_launcher_ends_exits_with_its_own_status() -> None:
    code = """if True:
        import os, signal, threading
        from gpt4moe.parallel.environment import Environment
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        Environment(rank=1, world_size=2, local_rank=1, master=None, source="test").refuse_together(2)
        os._exit(77)"""
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 2
