"""The train command, whole, in forked ranks: `gpt4moe.train.main` under the variables that a launcher sets.

A fork costs 0.1 s where a cold process costs 6; what a rank prints and its exit status come back.
"""

import errno
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt4moe.parallel.environment import Environment
from gpt4moe.runlog.metrics_table import TIMINGS
from tests.spawn import run_ranks

BATCH, SEQ = 8, 32
SMALL = (
    "+experiment=tiny", "data=mock", "model.num_layers=2", "model.hidden_size=32", f"model.seq_length={SEQ}",
    "model.vocab_size=256", "model.moe.num_experts=4", "model.moe.ffn_hidden_size=32", "training.steps=6",
    f"training.global_batch_size={BATCH}", "training.micro_batch_size=1", "training.eval_every=0",
    "training.eval_samples=8", "optimizer.lr=0.002", "schedule.warmup_steps=2",
    "schedule.total_steps=20", "tracking.wandb=disabled", "checkpoint.asynchronous=false",
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    status: int
    out: str
    err: str


@dataclass(frozen=True, kw_only=True)
class Event:
    """What befalls a rank right after a step and its checkpoint: a signal, a full disk, or a halt until `go` exists."""

    after_step: int
    rank: int = 0
    sent: signal.Signals | None = None
    fills_disk: bool = False
    fills_stdout: bool = False
    go: Path | None = None


Variables = dict[str, str]


def train(
    folder: Path,
    *overrides: str,
    ranks: int = 1,
    events: tuple[Event, ...] = (),
    variables: Variables | None = None,
) -> list[Ended]:
    """Runs the command for the run folder `folder` on `ranks` ranks, small unless overridden; how each ended."""
    arguments = [*SMALL, f"run.root={folder.parent}", f"run.name={folder.name}", *overrides]
    return run_ranks(ranks, run_rank, arguments, events, variables or {})


def outside() -> Variables:
    """This process's variables without those of a launcher around the tests, and of a wandb service that an earlier
    test left: it would outlive a rank that is killed."""
    foreign = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "WANDB_SERVICE")
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", *foreign))}


def metrics(folder: Path, *, timings: bool = False) -> list[dict[str, Any]]:
    """metrics.jsonl as it stands, every line."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in r.items() if timings or key not in TIMINGS} for r in records]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def saved_state(folder: Path, step: int) -> dict[str, bytes]:
    """The bytes of a checkpoint's tensors."""
    files = (folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")
    return {file.name: file.read_bytes() for file in files}


def run_rank(environment: Environment, arguments: list[str], events: tuple[Event, ...], variables: Variables) -> Ended:
    from gpt4moe.parallel import environment as resolver
    from gpt4moe.train import main

    # Nobody ends a forked rank because another has left.
    resolver.FIRST_STAYS_SECONDS = resolver.OTHERS_STAY_SECONDS = 0.0
    set_variables(environment, variables)
    _add_events([event for event in events if event.rank == environment.rank])
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), sys.stdout.fileno())
        os.dup2(err.fileno(), sys.stderr.fileno())
        status = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        out.seek(0)
        err.seek(0)
        return Ended(status, out.read(), err.read())


def set_variables(environment: Environment, variables: Variables) -> None:
    """What torchrun sets for several ranks, nothing for one."""
    kept = outside()
    os.environ.clear()
    os.environ.update(kept)
    if environment.master is not None:
        address, port = environment.master
        rank = str(environment.rank)
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(environment.world_size))
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    os.environ.update(variables)


def _no_space(file: int, data: bytes) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _add_events(events: list[Event]) -> None:
    """Events are a callback behind the run's own ones."""
    from gpt4moe.runlog.metrics import Record
    from gpt4moe.training import build
    from gpt4moe.training.callback import Callback
    from gpt4moe.training.state import TrainingContext
    from gpt4moe.training.step import StepResult

    class Events(Callback):
        def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
            for event in events:
                if event.after_step == context.state.step:
                    if event.sent is not None:
                        os.kill(os.getpid(), event.sent)
                    if event.fills_stdout:
                        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
                    if event.fills_disk:
                        os.write = _no_space
                    while event.go is not None and not event.go.exists():
                        time.sleep(0.02)

    own = build.build_callbacks
    build.build_callbacks = lambda *given: [*own(*given), Events()]
