"""The command as people start it: python -m, torchrun; cold processes, so only what needs them."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

from tests.training.command import SMALL, metrics, outside

ROOT = Path(__file__).resolve().parents[2]


def command(launcher: list[str], folder: Path, *overrides: str) -> list[str]:
    return [
        sys.executable, "-m", *launcher, "gpt4moe.train", *SMALL, f"run.root={folder.parent}",
        f"run.name={folder.name}", *overrides,
    ]  # fmt: skip


def torchrun(logs: Path) -> list[str]:
    """Two ranks, the output of each in a file of its own."""
    return ["torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--log-dir={logs}", "--redirects=3", "-m"]


def printed(logs: Path, stream: str, attempt: int = 0) -> list[str]:
    """What each rank printed. Args: attempt: torchrun's restarts before."""
    return [file.read_text() for file in sorted(logs.glob(f"*/attempt_{attempt}/*/{stream}.log"))]


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
    arguments = command(torchrun(logs), tmp_path / "x", "parallel.pp=3")
    launcher = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=outside(), check=False)
    first, second = printed(logs, "stderr")
    assert [line.partition(":")[0] for line in first.splitlines()] == ["error", "fix"]
    assert (second, printed(logs, "stdout")) == ("", ["", ""])
    assert launcher.stderr.count("exitcode  : 2") == 2, launcher.stderr


def test_torchrun_starts_killed_ranks_again_and_ctrl_c_then_leaves_a_checkpoint_of_the_last_step(
    tmp_path: Path,
) -> None:
    folder, logs = tmp_path / "x", tmp_path / "logs"
    launcher_words = [*torchrun(logs)[:-1], "--max-restarts=1", "-m"]
    arguments = command(launcher_words, folder, "training.steps=100000", "parallel.ep=2", "checkpoint.every=2")
    launcher = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, cwd=ROOT, env=outside())
    deadline = time.monotonic() + 240

    def until(launches: int) -> None:
        """So many launches, and three steps in the last."""
        while (
            len(starts := sorted(folder.glob("starts/*.yaml"))) < launches
            or last_step(folder) < first_step(starts[-1]) + 3
        ):
            assert launcher.poll() is None and time.monotonic() < deadline, printed(logs, "stderr")
            time.sleep(0.05)

    try:
        until(1)
        ranks = psutil.Process(launcher.pid).children()
        next(rank for rank in ranks if rank.environ().get("RANK") == "1").kill()
        until(2)
        launcher.send_signal(signal.SIGINT)  # its agent hands it to the ranks, and starts none again
        launcher.wait(60)
    finally:
        launcher.kill()
    steps = [record["step"] for record in metrics(folder)]
    assert steps == list(range(1, len(steps) + 1))
    starts = [yaml.safe_load(file.read_text()) for file in sorted(folder.glob("starts/*.yaml"))]
    assert [start["ranks"] for start in starts] == [2, 2] and starts[1]["first_step"] > 1
    manifest = folder / "checkpoints" / f"step-{len(steps):08d}" / "manifest.json"
    assert json.loads(manifest.read_text())["step"] == len(steps)
    assert "SIGINT received" in printed(logs, "stdout", attempt=1)[0]


def last_step(folder: Path) -> int:
    return max((record["step"] for record in metrics(folder)), default=0) if (folder / "metrics.jsonl").exists() else 0


def first_step(start: Path) -> int:
    return int(yaml.safe_load(start.read_text())["first_step"])


def test_torchrun_goes_on_with_the_node_that_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = free.getsockname()[1]

    def node(name: str) -> subprocess.Popen[bytes]:
        elastic = [
            "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--monitor-interval=0.1",
            "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{meeting}", "--rdzv-id=elastic",
            "--rdzv-conf=last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3",
            f"--log-dir={tmp_path / name}", "--redirects=3", "-m",
        ]  # fmt: skip
        arguments = command(elastic, folder, "training.steps=100", "checkpoint.every=5")
        return subprocess.Popen(arguments, stderr=subprocess.DEVNULL, cwd=ROOT, env=outside())

    deadline = time.monotonic() + 180
    nodes = [node("first")]
    try:
        while not _answers(meeting):  # the place to meet is on the node that stays
            assert nodes[0].poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        nodes.append(node("second"))
        while not list(folder.glob("checkpoints/*/manifest.json")):
            assert nodes[0].poll() is None and time.monotonic() < deadline, printed(tmp_path / "first", "stderr")
            time.sleep(0.02)
        for process in [*psutil.Process(nodes[1].pid).children(recursive=True), nodes[1]]:
            process.kill()
        assert nodes[0].wait(180) == 0
    finally:
        for launcher in nodes:
            launcher.kill()
    starts = [yaml.safe_load(file.read_text()) for file in sorted(folder.glob("starts/*.yaml"))]
    assert [start["ranks"] for start in starts] == [2, 1]
    assert [record["step"] for record in metrics(folder)] == list(range(1, 101))


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("localhost", port)) == 0
