"""Online, to a server that speaks wandb's API: one run over kills and restarts, each step once; alerts; uploads."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpt4moe.config.training import TrackingConfig, WandbMode
from gpt4moe.parallel.environment import Environment
from gpt4moe.runlog.wandb_run import WandbMark, WandbRun
from tests.runlog.wandb_server import StoredRun, WandbServer, wandb_server
from tests.spawn import run_ranks
from tests.training.command import Event, Variables, metrics, outside, train

ONLINE = (
    "training.steps=4", "checkpoint.every=2", "tracking.wandb=online", "tracking.project=p", "tracking.entity=team",
    "tracking.group=g", "tracking.tags=[a,b]",
)  # fmt: skip


def the_run(server: WandbServer, folder: Path) -> StoredRun:
    """The only one that the server has; its id is the run folder's, and no line was written over another."""
    ((name, run),) = server.runs.items()
    assert (folder / "wandb_id.txt").read_text().split()[0] == name
    assert run.overwritten == []
    return run


def test_a_killed_and_resumed_run_is_one_online_run_with_each_step_once(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    with wandb_server() as server:
        variables = server.variables
        with pytest.raises(AssertionError, match="died"):
            train(folder, *ONLINE, variables=variables, events=(Event(after_step=3, sent=signal.SIGKILL),))
        killed = len(server.asked)
        ended = train(folder, *ONLINE, "parallel.tp=2", ranks=2, variables=variables)
    assert [rank.status for rank in ended] == [0, 0], ended[0].err
    assert "wandb" not in ended[0].out + ended[0].err, "online there is nothing to say"
    run = the_run(server, folder)
    assert ("RunResumeStatus", run.name) in server.asked[killed:], "what it has is asked of the server"
    assert run.steps == [1, 2, 3, 4]
    for line, record in zip(run.history(), metrics(folder), strict=True):
        assert {name: line[name] for name in record if name != "step"} == {
            name: value for name, value in record.items() if name != "step"
        }
    told = {name: run.values[name] for name in ("project", "entity", "groupName", "displayName", "tags")}
    assert told == {"project": "p", "entity": "team", "groupName": "g", "displayName": "x", "tags": ["a", "b"]}
    assert '"hidden_size":32' in run.values["config"]


def log_steps(environment: Environment, mode: WandbMode, folder: Path, steps: list[int], variables: Variables) -> None:
    """One start in a process of its own, which sends these steps and an alert."""
    kept = outside()
    os.environ.clear()
    os.environ.update({**kept, **variables})
    tracker = WandbRun.start(TrackingConfig(wandb=mode, project="p"), folder, "n", {})
    for step in steps:
        tracker.log({"step": step, "loss": 1.0 / step})
    tracker.alert("no progress", "no step for 0:05:01")
    tracker.finish()


def test_after_a_kill_only_what_the_server_lacks_is_sent_and_alerts_arrive(tmp_path: Path) -> None:
    with wandb_server() as server:
        run_ranks(1, log_steps, WandbMode.online, tmp_path, [1, 2, 3, 4, 5], server.variables)
        assert the_run(server, tmp_path).steps == [1, 2, 3, 4, 5]
        # As a kill leaves it whose last three steps wandb's service had not sent yet: it sends every 15 s.
        mark = WandbMark.read(tmp_path)
        WandbMark(mark.file, sent=8, kept=0, start=mark.start).begin(mark.start)
        run_ranks(1, log_steps, WandbMode.online, tmp_path, list(range(4, 11)), server.variables)
    assert the_run(server, tmp_path).steps == list(range(1, 11))
    assert [(alert["title"], alert["text"]) for alert in server.alerts] == [("no progress", "no step for 0:05:01")] * 2


def test_the_sync_line_uploads_offline_starts_as_one_run(tmp_path: Path) -> None:
    dead = {"WANDB_BASE_URL": "http://127.0.0.1:9"}
    for steps in ([1, 2, 3], [4, 5]):
        run_ranks(1, log_steps, WandbMode.offline, tmp_path, steps, dead)
    line = f"{sys.executable} -m wandb sync {tmp_path}/wandb/offline-run-*-*"
    with wandb_server() as server:
        uploaded = subprocess.run(
            ["bash", "-c", line], env=outside() | server.variables, capture_output=True, text=True, timeout=100
        )
    assert uploaded.returncode == 0, uploaded.stderr
    assert the_run(server, tmp_path).steps == [1, 2, 3, 4, 5]
    assert server.alerts == [], "nobody can do anything about an offline alert any more"
