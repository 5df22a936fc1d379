"""One wandb run over all starts, each step sent once, and never a reason for training to stop."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpt4moe.config.training import TrackingConfig, WandbMode
from gpt4moe.runlog.wandb_run import WandbMark, WandbRun, has_key, run_id

OFFLINE = TrackingConfig(wandb=WandbMode.offline, project="test", tags=["a"])


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Port 9 refuses: whatever wanted the network would fail. No key of this machine is seen."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


class FakeRun:
    """Counts what reaches wandb."""

    def __init__(self, fail: bool = False):
        self.sent: list[tuple[int, dict[str, float]]] = []
        self.fail = fail
        self.settings = SimpleNamespace(sync_dir="/x/wandb/run-1-a")
        self.starting_step = 0

    def log(self, values: dict[str, float], step: int) -> None:
        if self.fail:
            raise RuntimeError("wandb is ill")
        self.sent.append((step, values))

    def finish(self, exit_code: int) -> None:
        pass


def connected(run_folder: Path, fake: FakeRun) -> WandbRun:
    """A tracker as `start` leaves it, connected to `fake`."""
    tracker = WandbRun.start(TrackingConfig(wandb=WandbMode.disabled), run_folder, "r", {})
    tracker.mark = WandbMark.read(run_folder)
    tracker.mark.begin("run-1-a")
    tracker.run = fake
    return tracker


def test_an_offline_run_is_in_the_run_folder_and_a_restart_keeps_its_id(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for first in (1, 4):
        tracker = WandbRun.start(OFFLINE, tmp_path, "name", {"model": {"hidden_size": 32}})
        assert tracker.run is not None and tracker.run.id == run_id(tmp_path, "name")
        for step in range(first, first + 3):
            tracker.log({"step": step, "loss": 1.0 / step})
        tracker.finish()
        assert tracker.sync_command() == f"wandb sync {tmp_path}/wandb/offline-run-*-{tracker.wandb_id}"
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert folders and all(run_id(tmp_path, "name") in folder.name for folder in folders)
    assert all(list(folder.glob("*.wandb")) for folder in folders)
    for folder in folders:
        (folder / "run.wandb.synced").touch()  # what `wandb sync` leaves
    assert tracker.sync_command() is None
    assert (tmp_path / "wandb_step.txt").read_text().split()[:2] == ["000000000006"] * 2
    assert capfd.readouterr() == ("", ""), "wandb must not chatter"


def test_disabled_tracking_never_imports_wandb_and_writes_nothing(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from gpt4moe.config.training import TrackingConfig, WandbMode\n"
        "from gpt4moe.runlog.wandb_run import WandbRun\n"
        "run = WandbRun.start(TrackingConfig(wandb=WandbMode.disabled), Path(sys.argv[1]), 'n', {})\n"
        "run.log({'step': 1, 'loss': 1.0}); run.finish()\n"
        "sys.exit('wandb' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)]).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_online_without_a_key_warns_once_and_goes_offline(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = WandbRun.start(TrackingConfig(wandb=WandbMode.online), tmp_path, "n", {})
    tracker.log({"step": 1, "loss": 1.0})
    tracker.finish()
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    assert "WANDB_API_KEY" in caplog.text
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_a_redone_step_is_sent_once(tmp_path: Path) -> None:
    first, second = FakeRun(), FakeRun()
    tracker = connected(tmp_path, first)
    for step in range(1, 8):
        tracker.log({"step": step, "loss": 1.0})
    tracker.finish()
    tracker = connected(tmp_path, second)
    for step in range(5, 10):
        tracker.log({"step": step, "loss": 2.0})
    assert [step for step, _ in first.sent] == [1, 2, 3, 4, 5, 6, 7]
    assert second.sent == [(8, {"loss": 2.0}), (9, {"loss": 2.0})]


def test_what_a_killed_start_sent_but_wandb_dropped_is_sent_again(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path\n"
        "from gpt4moe.config.training import TrackingConfig\n"
        "from gpt4moe.runlog.wandb_run import WandbRun\n"
        "run = WandbRun.start(TrackingConfig(), Path(sys.argv[1]), 'n', {})\n"
        "for step in range(1, 201): run.log({'step': step, **{f'm{i}': step / 7 for i in range(20)}})\n"
        "os.kill(os.getpid(), 9)"
    )
    # A wandb service of its own, which dies with it; one of an earlier test in this process would live on.
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=own).returncode == -9
    assert WandbMark.read(tmp_path).sent == 200
    tracker = WandbRun.start(OFFLINE, tmp_path, "n", {})
    again = tracker.mark.sent + 1
    for step in range(1, 203):
        tracker.log({"step": step, "loss": 1.0})
    tracker.finish()
    files = [history(folder) for folder in sorted((tmp_path / "wandb").glob("offline-run-*"))]
    assert files[1] == list(range(again, 203))
    assert files[0] + files[1] == list(range(1, 203)), "every step once, in the order of upload"
    assert WandbMark.read(tmp_path).is_sure


def history(folder: Path) -> list[int]:
    """The steps in wandb's file of a start."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    return [record["history"]["item"]["_step"] for record in records if record["type"] == "history"]


def test_after_an_unfinished_online_start_the_server_says_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    fake = FakeRun()
    monkeypatch.setattr(wandb, "init", lambda **values: fake)
    WandbMark(tmp_path / "wandb_step.txt", sent=9, kept=4, start="run-1-a").begin("run-1-a")
    fake.starting_step = 7  # it has steps up to 6
    tracker = WandbRun.start(TrackingConfig(wandb=WandbMode.online), tmp_path, "n", {})
    for step in range(5, 11):
        tracker.log({"step": step, "loss": 1.0})
    assert [step for step, _ in fake.sent] == [7, 8, 9, 10]


def test_a_failing_wandb_warns_once_and_becomes_a_no_op(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = connected(tmp_path, FakeRun(fail=True))
    for step in range(1, 4):
        tracker.log({"step": step, "loss": 1.0})
    tracker.finish()
    assert len(caplog.records) == 1 and "wandb is ill" in caplog.text


def test_an_unreadable_mark_does_not_stop_a_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "wandb_step.txt").write_text("not a number")
    tracker = WandbRun.start(OFFLINE, tmp_path, "n", {})
    tracker.log({"step": 1, "loss": 1.0})
    assert tracker.run is None and len(caplog.records) == 1


def test_two_run_folders_get_two_ids(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert run_id(tmp_path / "a", "x") != run_id(tmp_path / "b", "x")
    assert run_id(tmp_path / "a", "x") == run_id(tmp_path / "a", "x")


def test_a_copied_folder_under_a_new_name_gets_an_id_and_sends_its_steps_anew(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    parent = run_id(tmp_path / "a", "a")
    (tmp_path / "a" / "wandb_step.txt").write_text("000000000009\n")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    fork = run_id(tmp_path / "b", "b")
    assert fork != parent
    assert run_id(tmp_path / "b", "b") == fork, "and keeps it"
    assert not (tmp_path / "b" / "wandb_step.txt").exists()
    assert run_id(tmp_path / "a", "a") == parent
    assert (tmp_path / "a" / "wandb_step.txt").exists()


def test_project_entity_group_and_tags_reach_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    given: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", lambda **values: given.update(values) or FakeRun())
    tracking = TrackingConfig(project="p", entity="e", group="g", tags=["a", "b"])
    WandbRun.start(tracking, tmp_path, "name", {"model": {"hidden_size": 32}})
    wanted = {
        "mode": "offline", "id": run_id(tmp_path, "name"), "resume": "allow", "dir": str(tmp_path), "name": "name",
        "project": "p", "entity": "e", "group": "g", "tags": ["a", "b"], "config": {"model": {"hidden_size": 32}},
    }  # fmt: skip
    assert {name: given[name] for name in wanted} == wanted


def test_a_netrc_entry_of_wandbs_server_is_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert has_key("https://wandb.example.org")
    assert not has_key("https://api.wandb.ai")
