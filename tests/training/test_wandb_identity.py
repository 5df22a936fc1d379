"""One wandb run over the restarts of a run, another for each fork; and offline means offline."""

import io
import logging
import os
import re
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt4moe.config.training import TrackingConfig, WandbMode
from gpt4moe.operations.run_status import statuses
from gpt4moe.parallel.environment import Environment
from gpt4moe.runlog import wandb_run
from gpt4moe.runlog.wandb_run import WandbMark, WandbRun
from tests.spawn import run_ranks
from tests.training.command import SMALL, Ended, Event, Variables, metrics, outside, run_rank

FOUR = ("training.steps=4", "checkpoint.every=2", "tracking.wandb=offline")


@dataclass
class Trap:
    """A proxy that answers nobody, and what asked it: wandb's service is a process of its own, in Go."""

    variables: Variables
    asked: list[bytes] = field(default_factory=list)


@contextmanager
def trap() -> Iterator[Trap]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        variables = {spelt: proxy for name in names for spelt in (name, name.lower())}
        found = Trap({**variables, "NO_PROXY": "", "no_proxy": "", "WANDB_BASE_URL": "https://wandb.invalid"})

        def serve() -> None:
            while True:
                try:
                    caller, _ = server.accept()
                except OSError:
                    return
                found.asked.append(caller.recv(100))
                caller.close()

        threading.Thread(target=serve, daemon=True).start()
        yield found


def without_network(
    environment: Environment, arguments: list[str], events: tuple[Event, ...], variables: Variables
) -> Ended:
    """The train command in a process whose Python may not look up a host or connect to one."""

    def refuse(event: str, values: tuple[object, ...]) -> None:
        is_internet = event == "socket.connect" and getattr(values[0], "family", None) != socket.AF_UNIX
        if is_internet or event == "socket.getaddrinfo":
            raise PermissionError(f"no network here: {event} {values[1:]}")

    sys.addaudithook(refuse)
    return run_rank(environment, arguments, events, variables)


def train(folder: Path, *overrides: str, proxy: Trap, events: tuple[Event, ...] = (), ranks: int = 1) -> Ended:
    arguments = [*SMALL, *FOUR, f"run.root={folder.parent}", f"run.name={folder.name}", *overrides]
    first: Ended = run_ranks(ranks, without_network, arguments, events, proxy.variables)[0]
    return first


def ids(folder: Path) -> list[str]:
    """Of the wandb runs that a folder's starts wrote, each start's own."""
    return [path.name.rsplit("-", 1)[1] for path in sorted((folder / "wandb").glob("offline-run-*"))]


def test_restarts_are_one_wandb_run_forks_are_others_and_nothing_asks_the_network(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    with trap() as proxy:
        with pytest.raises(AssertionError, match="died"):
            train(a, proxy=proxy, events=(Event(after_step=3, sent=signal.SIGKILL),))
        assert WandbMark.read(a).sent == 3
        resumed = train(a, "parallel.tp=2", ranks=2, proxy=proxy)
        shutil.copytree(a, b)
        copied = train(b, "training.steps=5", proxy=proxy)
        loaded = train(c, "training.steps=5", f"checkpoint.load={a}", proxy=proxy)
    for ended in (resumed, copied, loaded):
        assert (ended.status, ended.err) == (0, "")
        assert "wandb start failed" not in ended.out and "no network here" not in ended.out
    assert proxy.asked == []

    (own,) = set(ids(a))
    assert len(ids(a)) == 2 and (a / "wandb_id.txt").read_text() == f"{own} a\n"
    (copy_id,) = set(ids(b)) - {own}
    (loaded_id,) = set(ids(c))
    assert len({own, copy_id, loaded_id}) == 3
    assert "is a fork of it" in copied.out
    for ended, folder, wandb_id in ((resumed, a, own), (copied, b, copy_id), (loaded, c, loaded_id)):
        assert f"wandb sync {folder}/wandb/offline-run-*-{wandb_id}\n" in ended.out
    assert [WandbMark.read(path).sent for path in (a, b, c)] == [4, 5, 5]
    assert re.fullmatch(r"[a-z0-9]{8}", own)
    for fork in (b, c):  # of one rank: it pays from its own start on, not for its parent
        (status,) = statuses([fork])
        assert status.account is not None and len(status.account.attempts) == 1
        assert 0 < metrics(fork, timings=True)[-1]["device_hours"] * 3600 <= status.account.wall_seconds


def test_steps_that_wandb_missed_are_sent_at_the_next_start(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    quiet = [*SMALL, f"run.root={tmp_path}", "run.name=x"]
    run_ranks(1, run_rank, [*quiet, "training.steps=2"], (), {})
    assert not (folder / "wandb").exists()
    sent = run_ranks(1, sent_steps, [*quiet, "training.steps=3", "tracking.wandb=offline"], {})
    assert sent == [[1, 2, 3]]
    assert [record["step"] for record in metrics(folder)] == [1, 2, 3]


def sent_steps(environment: Environment, arguments: list[str], variables: Variables) -> list[int]:
    """What the train command sends to wandb."""
    import wandb

    class Listener:
        settings = SimpleNamespace(sync_dir="/x/wandb/offline-run-1-a")

        def __init__(self) -> None:
            self.steps: list[int] = []

        def log(self, values: dict[str, float], step: int) -> None:
            self.steps.append(step)

        def finish(self, exit_code: int) -> None:
            pass

    listener = Listener()
    wandb.init = lambda **values: listener
    run_rank(environment, arguments, (), variables)
    return listener.steps


def test_an_unreachable_server_is_asked_and_then_tracking_goes_offline(tmp_path: Path) -> None:
    """Also shows that the trap above catches what it should."""
    with trap() as proxy:
        ((wandb_id, said),) = run_ranks(1, online, tmp_path, {**proxy.variables, "WANDB_API_KEY": "0" * 40})
    assert any(b"wandb.invalid" in asked for asked in proxy.asked)
    assert "going offline" in said
    assert ids(tmp_path) == [wandb_id]


def online(environment: Environment, folder: Path, variables: Variables) -> tuple[str | None, str]:
    """One step sent online, in a process of its own: its id and what it warned of."""
    said = io.StringIO()
    logging.getLogger("gpt4moe").addHandler(logging.StreamHandler(said))
    kept = outside()
    os.environ.clear()
    os.environ.update({**kept, **variables})
    wandb_run.NETWORK_SECONDS = 1.0
    tracker = WandbRun.start(TrackingConfig(wandb=WandbMode.online), folder, "n", {})
    tracker.log({"step": 1, "loss": 1.0})
    tracker.finish()
    return tracker.wandb_id, said.getvalue()
