"""RunFolder: the folder of a run, with its identity, its frozen config and its lock.

    runs/NAME/resolved.yaml      the config of the first launch that took a step; never changes then
              identity.json      what every launch must match, and the run's id; of the data: as the last launch had it
              SHA256SUMS         of these, of starts/ and of gone_back.json
              starts/001.yaml    one per launch: time, job, layout, differences from resolved.yaml, the whole config
              checkpoints/  metrics.jsonl  events.jsonl  samples.jsonl  evaluations.jsonl  logs/  wandb/  report.html
              routing/  loss.png  gone_back.json (training.gone_back)

Rank 0 alone writes here, but for checkpoints/ and routing/. If it raises an error, all ranks do (parallel.agreement).
"""

import fcntl
import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import yaml

from gpt4moe.checkpoint.retention import latest_saved
from gpt4moe.config.load import config_to_dict, config_to_yaml
from gpt4moe.config.run import RunConfig
from gpt4moe.config.yaml_text import load_yaml
from gpt4moe.data.passed_over import GONE_BACK_FILE, NOTHING, read_gone_back
from gpt4moe.errors import LaunchError
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.slurm_job import SlurmJob
from gpt4moe.runlog.metrics_log import METRICS_FILE
from gpt4moe.runlog.run_files import SUMS_FILE, add_sums, has_other_sum, noted_files, replace_file, replace_noted
from gpt4moe.training.identity import PHASES, differences, identity_of, refuse_other_identity


@dataclass(slots=True)
class RunFolder:
    """A run's folder. Every rank reads it; rank 0 keeps it locked."""

    path: Path
    lock: TextIO | None = None
    _starts: list[dict[str, Any]] | None = None

    @classmethod
    def of(cls, run: RunConfig) -> "RunFolder":
        return cls(Path(run.run.root) / run.run.name)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / METRICS_FILE

    @property
    def run_id(self) -> str:
        return str(self.read_identity()["run_id"])

    def acquire(self, job: SlurmJob) -> None:
        """Locks the folder until this process ends, also by a kill. Rank 0 only.

        Args:
            job: the lock file names it, for the error of another process that finds the folder in use.
        Raises: LaunchError when another job is using it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.lock.seek(0)
            holder = self.lock.read().strip() or "another job"
            raise LaunchError(
                f"The run folder {self.path} is in use by {holder}.",
                "Wait for it, stop it, or choose another run.name.",
            ) from error
        self.lock.truncate(0)
        in_job = f" (Slurm job {job.job_id})" if job.job_id is not None else ""
        self.lock.write(f"process {os.getpid()} on {os.uname().nodename}{in_job}")
        self.lock.flush()

    def read_identity(self) -> dict[str, Any]:
        return _stored(self.path / "identity.json", json.loads, "run_id")

    @property
    def is_made(self) -> bool:
        """Whether a launch has written its config; False too for a path that no folder can have."""
        return os.path.isfile(self.path / "resolved.yaml")

    @property
    def is_begun(self) -> bool:
        """Whether its identity holds: a launch has taken a step. Launches that ended before (a model that no memory
        holds, a damaged checkpoint.load) have used up no name."""
        has_steps = self.metrics.is_file() and self.metrics.stat().st_size > 0
        return has_steps or any(self.checkpoints.glob("*/*"))

    def check_identity(self, run: RunConfig, data_identity: dict[str, str]) -> None:
        """Raises: ConfigError when something differs from the first launch that took a step, if there was one."""
        if not self.is_begun:
            return
        _stored(self.path / "resolved.yaml", load_yaml)
        for noted in noted_files(self.path, GONE_BACK_FILE):
            _stored(noted, json.loads)
        theirs, ours = self.read_identity(), identity_of(run, data_identity)
        drawn = self.drawn_samples(run) if theirs.get("data") != ours["data"] else 0
        refuse_other_identity(theirs, ours, self.path, run=run, drawn_samples=drawn)

    def drawn_samples(self, run: RunConfig) -> int:
        """Where in the order of its samples the run goes on. Raises: Gpt4MoeError for a damaged record."""
        starts = self.starts()
        # Without a checkpoint the run begins where its last launch did: that of checkpoint.load may be of any step.
        steps = latest_saved(self.path) or (starts[-1]["first_step"] - 1 if starts else 0)
        passed_over = (read_gone_back(self.path) or (NOTHING, []))[0]
        return passed_over.position(run.step_sizes.samples(steps))

    def freeze(self, run: RunConfig, data_identity: dict[str, str]) -> None:
        """Writes the config and identity of a run that has not begun; later launches change nothing but phases of the
        data that were not read yet. Rank 0 only, lock held, after check_identity."""
        if self.is_begun:
            self._note_phases(identity_of(run, data_identity))
        else:
            (self.path / SUMS_FILE).unlink(missing_ok=True)  # a kill before the last line leaves files without sums
            replace_file(self.path / "resolved.yaml", config_to_yaml(run).encode())
            known = (self.path / "identity.json").exists()
            run_id = self.run_id if known else uuid.uuid4().hex  # what was logged so far is of this run
            identity = {"run_id": run_id, **identity_of(run, data_identity)}
            replace_file(self.path / "identity.json", json.dumps(identity, indent=1).encode())
            others = [GONE_BACK_FILE, *(f"starts/{file.name}" for file in (self.path / "starts").glob("*.yaml"))]
            of_launches = [name for name in others if (self.path / name).is_file()]  # that ended before a step
            add_sums(self.path, "resolved.yaml", "identity.json", *of_launches)

    def _note_phases(self, ours: dict[str, Any]) -> None:
        theirs = self.read_identity()
        if theirs.get("data") != ours["data"]:
            kept = {key: value for key, value in theirs.items() if key != PHASES}
            now = kept | {key: ours[key] for key in ("data", PHASES) if key in ours}
            replace_noted(self.path, "identity.json", json.dumps(now, indent=1).encode())

    def record_start(self, run: RunConfig, *, job: SlurmJob, layout: Layout, first_step: int) -> None:
        """Writes starts/NNN.yaml, the record of this launch. Rank 0 only, lock held, after freeze."""
        starts = self.path / "starts"
        starts.mkdir(exist_ok=True)
        number = len(list(starts.glob("*.yaml"))) + 1
        frozen = _stored(self.path / "resolved.yaml", load_yaml)
        config = config_to_dict(run)
        record = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "job": job.job_id,
            "first_step": first_step,
            "layout": layout.describe(),
            "ranks": layout.world_size,
            "changed": {key: {"was": was, "is": now} for key, was, now in differences(frozen, config)},
            "config": config,
        }
        replace_file(starts / f"{number:03d}.yaml", yaml.safe_dump(record, sort_keys=False).encode())
        add_sums(self.path, f"starts/{number:03d}.yaml")

    def last_config(self, jobs: Sequence[str | None]) -> dict[str, Any] | None:
        """The config of the last launch by these Slurm jobs; None if none of them began to train."""
        starts = [start for start in self.starts() if start.get("job") in jobs]
        if not starts:
            return None
        config = starts[-1]["config"]
        assert isinstance(config, dict)
        return config

    def starts(self) -> list[dict[str, Any]]:
        """The records of earlier launches, in order; read once."""
        if self._starts is None:
            files = sorted({*(self.path / "starts").glob("*.yaml"), *noted_files(self.path, "starts/")})
            self._starts = [_stored(file, load_yaml, "first_step", "config") for file in files]
        return self._starts


def _stored(file: Path, read: Callable[[str], Any], *keys: str) -> dict[str, Any]:
    """A file that an earlier launch wrote. Raises: LaunchError when it is damaged, gone or lacks one of the keys."""
    folder = file.parent.parent if file.parent.name == "starts" else file.parent
    try:
        loaded = read(file.read_text())
        is_other = has_other_sum(folder, file.relative_to(folder).as_posix())
    except (OSError, ValueError, RecursionError):
        loaded, is_other = None, False
    if not isinstance(loaded, dict) or not set(keys) <= set(loaded):
        raise LaunchError(
            f"{file} is damaged or gone.",
            f"Restore it from a copy, or go on under another run.name with checkpoint.load={folder}.",
        )
    if is_other:
        raise LaunchError(
            f"{file} is not what was written: its sha256 is not that of {SUMS_FILE}.",
            f"Restore it from a copy. If it is as it should be, remove {folder / SUMS_FILE}.",
        )
    return loaded
