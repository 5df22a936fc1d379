"""The command as people start it: python -m, torchrun; cold processes, so only what needs them.

No verdict hangs on how fast the machine is: runs end when they are told to, not after so many steps, a launch more than
were meant is none too many, and nothing has a time but the test itself.
"""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.training.command import SMALL, metrics, outside

pytestmark = pytest.mark.timeout(1200)
ROOT = Path(__file__).resolve().parents[2]


def command(launcher: list[str], folder: Path, *overrides: str, module: str = "gpt4moe.train") -> list[str]:
    return [
        sys.executable, "-m", *launcher, module, *SMALL, f"run.root={folder.parent}", f"run.name={folder.name}",
        *overrides,
    ]  # fmt: skip


def torchrun(logs: Path) -> list[str]:
    """Two ranks, the output of each in a file of its own. A signal's ranks have ten minutes to save."""
    return [
        "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--log-dir={logs}", "--redirects=3",
        "--shutdown-timeout=600", "-m",
    ]  # fmt: skip


def printed(logs: Path, stream: str) -> list[str]:
    """What each rank printed, of the first attempt of torchrun first."""
    return [file.read_text() for file in sorted(logs.glob(f"*/attempt_*/*/{stream}.log"))]


def test_one_cold_process_trains(tmp_path: Path) -> None:
    arguments = command([], tmp_path / "x", "training.steps=2", "tracking.wandb=offline")
    ended = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=outside(), check=False)
    assert ended.returncode == 0, ended.stderr
    assert [record["step"] for record in metrics(tmp_path / "x")] == [1, 2]
    assert list((tmp_path / "x" / "wandb").glob("offline-run-*"))
    assert "step 2/2" in ended.stdout
    assert "Traceback" not in ended.stderr


def test_torchrun_ranks_all_exit_2_and_the_first_alone_prints(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    (tmp_path / "train_abreast.py").write_text(TRAIN_ABREAST)
    arguments = command(torchrun(logs), tmp_path / "x", "parallel.pp=3", module="train_abreast")
    variables = {**outside(), "PYTHONPATH": str(tmp_path)}
    launcher = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=variables, check=False)
    first, second = printed(logs, "stderr")
    assert [line.partition(":")[0] for line in first.splitlines()] == ["error", "fix"]
    assert (second, printed(logs, "stdout")) == ("", ["", ""])
    assert launcher.stderr.count("exitcode  : 2") == 2, launcher.stderr


TRAIN_ABREAST = """
import runpy, time
from pathlib import Path
from gpt4moe.parallel.environment import Environment

refuse_together = Environment.refuse_together

def abreast(rank, status):
    Path(__file__).with_name(f"refuses-{rank.rank}").touch()
    while len(list(Path(__file__).parent.glob("refuses-*"))) < 2:
        time.sleep(0.05)
    refuse_together(rank, status)

Environment.refuse_together = abreast
runpy.run_module("gpt4moe.train", run_name="__main__", alter_sys=True)
"""
"""A rank that refuses waits 2 s, or 6 s, for the others, before torchrun kills them. On a machine that has no time for
one of them they might be too few, so here they begin when both have come that far."""


def test_torchrun_starts_killed_ranks_again_and_ctrl_c_then_leaves_a_checkpoint_of_the_last_step(
    tmp_path: Path,
) -> None:
    folder, logs = tmp_path / "x", tmp_path / "logs"
    arguments = command([*torchrun(logs)[:-1], "--max-restarts=9", "-m"], folder, *ENDLESS, "parallel.ep=2")
    launcher = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, cwd=ROOT, env=outside())
    try:
        until(lambda: made_steps(folder, launch=1), launcher, logs)
        ranks = psutil.Process(launcher.pid).children()
        next(rank for rank in ranks if rank.environ().get("RANK") == "1").kill()
        until(lambda: made_steps(folder, launch=2), launcher, logs)
        launcher.send_signal(signal.SIGINT)  # its agent hands it to the ranks, and starts none again
        launcher.wait()
    finally:
        launcher.kill()
    each_step_once_and_the_last_saved(folder)
    assert {start["ranks"] for start in starts(folder)} == {2} and starts(folder)[1]["first_step"] > 1
    assert any("SIGINT received" in text for text in printed(logs, "stdout"))


def test_torchrun_goes_on_with_the_node_that_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = free.getsockname()[1]

    (tmp_path / "torchrun_by_process.py").write_text(TORCHRUN_BY_PROCESS)
    variables = {**outside(), "PYTHONPATH": str(tmp_path)}

    def node(name: str) -> subprocess.Popen[bytes]:
        elastic = [
            "torchrun_by_process", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=99", "--monitor-interval=0.1",
            "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{meeting}", "--rdzv-id=elastic",
            "--rdzv-conf=last_call_timeout=1000,keep_alive_interval=1", f"--log-dir={tmp_path / name}", "--redirects=3",
            "--shutdown-timeout=600", "-m",
        ]  # fmt: skip
        arguments = command(elastic, folder, *ENDLESS)
        return subprocess.Popen(arguments, stderr=subprocess.DEVNULL, cwd=ROOT, env=variables)

    logs = tmp_path / "first"
    nodes = [node("first")]
    try:
        until(lambda: _answers(meeting), nodes[0], logs)  # the place to meet is on the node that stays
        nodes.append(node("second"))
        until(lambda: made_steps(folder), nodes[0], logs)
        together = starts(folder)
        assert {start["ranks"] for start in together} == {2}
        for process in [*psutil.Process(nodes[1].pid).children(recursive=True), nodes[1]]:
            process.kill()
        nodes[1].wait()
        (tmp_path / "second-is-lost").touch()
        until(lambda: made_steps(folder, launch=len(together) + 1), nodes[0], logs)
        nodes[0].send_signal(signal.SIGINT)
        nodes[0].wait()
    finally:
        for launcher in nodes:
            launcher.kill()
    each_step_once_and_the_last_saved(folder)
    assert starts(folder)[-1]["ranks"] == 1 and starts(folder)[-1]["first_step"] > 1


TORCHRUN_BY_PROCESS = """
import os
from datetime import UTC, datetime
from pathlib import Path
from torch.distributed import run
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _BackendRendezvousStateHolder as Holder

sanitize = Holder._sanitize

def by_process(holder):
    beats = holder._state.last_heartbeats
    for node in beats:
        try:
            os.kill(node.pid, 0)
            beats[node] = datetime.now(UTC)
        except ProcessLookupError:
            beats[node] = datetime.fromtimestamp(0, UTC)
    sanitize(holder)
    if Path(__file__).with_name("second-is-lost").exists() and holder._state.deadline is not None:
        holder._state.deadline = datetime.fromtimestamp(0, UTC)

Holder._sanitize = by_process
run.main()
"""
"""torchrun takes a node for lost that has not answered for some seconds, and begins without one that comes late: on a
machine that has no time for one of the two, they would part. Here a node is lost when its process is gone, and only
then the other begins without it."""
ENDLESS = ("training.steps=100000", "checkpoint.every=2")


def until(condition: Callable[[], bool], launcher: subprocess.Popen[bytes], logs: Path) -> None:
    while not condition():
        assert launcher.poll() is None, printed(logs, "stderr")
        time.sleep(0.05)


def starts(folder: Path) -> list[dict[str, Any]]:
    return [yaml.safe_load(file.read_text()) for file in sorted(folder.glob("starts/*.yaml"))]


def made_steps(folder: Path, launch: int = 1) -> bool:
    """Whether the newest launch, at least the so-manieth, has made three steps, so that one is saved."""
    made = starts(folder)
    if len(made) < launch or not (folder / "metrics.jsonl").exists():
        return False
    return max((record["step"] for record in metrics(folder)), default=0) >= made[-1]["first_step"] + 3


def each_step_once_and_the_last_saved(folder: Path) -> None:
    steps = [record["step"] for record in metrics(folder)]
    assert steps == list(range(1, len(steps) + 1))
    manifest = folder / "checkpoints" / f"step-{len(steps):08d}" / "manifest.json"
    assert json.loads(manifest.read_text())["step"] == len(steps)


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("localhost", port)) == 0
