"""RunFolder: the folder of a run, with its identity, its frozen config and its lock.

    runs/NAME/resolved.yaml      the config of the first launch that took a step; never changes then
              identity.json      what every launch must match, and the run's id
              SHA256SUMS         of these and of starts/
              starts/001.yaml    one per launch: time, job, layout, differences from resolved.yaml, the whole config
              checkpoints/  metrics.jsonl  events.jsonl  samples.jsonl  evaluations.jsonl  logs/  wandb/  report.html
              routing/  loss.png  gone_back.json (training.gone_back)

Rank 0 alone writes here, but for checkpoints/ and routing/. If it raises an error, all ranks do (parallel.agreement).
"""

import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import yaml

from gpt4moe.config.load import config_to_dict, config_to_yaml
from gpt4moe.config.run import RunConfig
from gpt4moe.config.stage import StageKind
from gpt4moe.config.yaml_text import load_yaml
from gpt4moe.errors import ConfigError, LaunchError
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.slurm_job import SlurmJob
from gpt4moe.runlog.metrics_log import METRICS_FILE
from gpt4moe.runlog.run_files import SUMS_FILE, add_sums, has_other_sum, noted_files, replace_file

ENCODER = "encoder"
"""Key of an identity: what the files of an encoder's folder say (architecture.encoder_folder.encoder_identity)."""


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
        refuse_other_identity(self.read_identity(), identity_of(run, data_identity), self.path)

    def freeze(self, run: RunConfig, data_identity: dict[str, str]) -> None:
        """Writes the config and identity of a run that has not begun; later launches change nothing. Rank 0 only, lock
        held."""
        if not self.is_begun:
            (self.path / SUMS_FILE).unlink(missing_ok=True)  # a kill before the last line leaves files without sums
            replace_file(self.path / "resolved.yaml", config_to_yaml(run).encode())
            known = (self.path / "identity.json").exists()
            run_id = self.run_id if known else uuid.uuid4().hex  # what was logged so far is of this run
            identity = {"run_id": run_id, **identity_of(run, data_identity)}
            replace_file(self.path / "identity.json", json.dumps(identity, indent=1).encode())
            add_sums(self.path, "resolved.yaml", "identity.json")

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


_OPTIONAL: dict[str, tuple[Any, str]] = {
    "batch_ramp": ([], "training.batch_ramp"), "length_ramp": ([], "training.length_ramp"),
    "stage": (StageKind.pretrain.value, "stage.kind"),
    "train": ([], "stage.train"), "lora": (None, "stage.lora"), "document_mask": (False, "data.document_mask"),
}  # fmt: skip
"""Key of an identity -> its default, which is not written, and the configuration's key."""


def identity_of(run: RunConfig, data_identity: dict[str, str]) -> dict[str, Any]:
    """What must stay the same over all launches of a run: model, tokenizer, data, seed, batch sizes, lengths of
    samples, stage, what is trained, document mask, the files of an encoder's folder.

    The ramps and the last four are written only if they are not the default: run folders and checkpoints made before
    have none.

    Args:
        data_identity: CheckedData.identity; with "encoder" once the encoder's files were read (training.encoder_files).
    """
    config = config_to_dict(run)
    lora = config["stage"]["lora"] | {"targets": sorted(run.stage.lora.targets)}
    optional = {
        **{key: config["training"][key] for key in ("batch_ramp", "length_ramp")},
        "stage": run.stage.kind.value, "train": sorted(run.stage.train),
        "lora": lora if run.stage.lora.rank else None, "document_mask": run.data.document_mask,
    }  # fmt: skip
    # A text model says nothing of vision: its checkpoints were written before there was the key.
    without = {"name", "lora"} | ({"vision"} if run.model.vision is None else set())
    return {
        "model": {key: value for key, value in config["model"].items() if key not in without},
        "data": data_identity["data"],
        "tokenizer": data_identity["tokenizer"],
        "seed": run.run.seed,
        "global_batch_size": run.training.global_batch_size,
        **{key: value for key, value in optional.items() if value != _OPTIONAL[key][0]},
        **({ENCODER: json.loads(data_identity[ENCODER])} if ENCODER in data_identity else {}),
    }


def comparable(theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two identities without what cannot be compared: an encoder's files where one of them does not say them (a run of
    before 2026-11-30; a launch that has not read them yet), and where the folder lies whose files are said. In one
    form."""
    sides, is_said = [theirs, ours], ENCODER in theirs
    if not (is_said and ENCODER in ours):
        sides = [{key: value for key, value in side.items() if key != ENCODER} for side in sides]
    if is_said:
        sides = [_without_folder(side) for side in sides]
    return _in_one_form(sides[0]), _in_one_form(sides[1])


def _without_folder(identity: dict[str, Any]) -> dict[str, Any]:
    vision = identity["model"].get("vision")
    if vision is None:
        return identity
    encoder = {key: value for key, value in vision["encoder"].items() if key != "folder"}
    return identity | {"model": identity["model"] | {"vision": vision | {"encoder": encoder}}}


def refuse_other_identity(theirs: dict[str, Any], ours: dict[str, Any], folder: Path) -> None:
    """Raises: ConfigError when the identity of the run in `folder` and ours differ, naming the values."""
    theirs, ours = comparable(theirs, ours)
    found = [(key, was, now) for key, was, now in differences(theirs, ours) if key != "run_id"]
    if not found:
        return
    named = {"seed": "run.seed", "global_batch_size": "training.global_batch_size"}
    named |= {key: name for key, (_, name) in _OPTIONAL.items()}
    named[f"{ENCODER}.weights"] = "other weights in model.vision.encoder.folder: sha256"
    groups = [key.partition(".")[0] for key, *_ in found]
    keys = [
        named.get(key) or named.get(group, group) + key.removeprefix(group)
        for group, (key, *_) in zip(groups, found, strict=True)
    ]
    shown = [f"{key} {_short(was)}, now {_short(now)}" for key, (_, was, now) in zip(keys[:3], found[:3], strict=True)]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    is_encoder = found[0][0].startswith(f"{ENCODER}.")
    weights = (
        f", with checkpoint.load={folder} to begin with its weights"
        if is_encoder or groups[0] in ("stage", "train", "lora")
        else ""
    )
    if "data" in groups:
        raise ConfigError(
            f"The run in {folder} was started with {'; '.join(shown)}{more}: its sources, shares or phases changed.",
            "Give the first values of data.* again (resolved.yaml has them), and the files as they were. A source that "
            "was extended since has its samples in another order: choose another run.name, with "
            f"checkpoint.load={folder} to begin with its weights.",
        )
    again = "put the first files back" if is_encoder else "give the first values again (resolved.yaml has them)"
    raise ConfigError(
        f"The run in {folder} was started with {'; '.join(shown)}{more}.",
        f"Choose another run.name for a new run{weights}, or {again}.",
    )


def _in_one_form(identity: dict[str, Any]) -> dict[str, Any]:
    """With defaults written out: equal runs that were written differently are equal."""
    found = {key: default for key, (default, _) in _OPTIONAL.items()} | identity
    lora, size = found["lora"], found.get("global_batch_size")  # a converted folder has no batch
    if lora:  # run folders of before 2026-11-30 have the patterns in the order that they were given in
        found["lora"] = lora | {"targets": sorted(lora["targets"])}
    if not found["batch_ramp"]:  # else a level without a size of its own has the ramp's
        found["length_ramp"] = [
            level | {"global_batch_size": level.get("global_batch_size") or size} for level in found["length_ramp"]
        ]
    return found


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, before, after) of every leaf that differs."""
    found = []
    for key in [*before, *(key for key in after if key not in before)]:
        was, now, path = before.get(key), after.get(key), f"{prefix}{key}"
        if isinstance(was, dict) and isinstance(now, dict):
            found += differences(was, now, f"{path}.")
        elif was != now:
            found.append((path, was, now))
    return found


def _short(value: Any) -> str:
    """The first characters of a hash; other values whole."""
    text = str(value)
    return f"{text[:12]}..." if len(text) == hashlib.sha256().digest_size * 2 else text


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
