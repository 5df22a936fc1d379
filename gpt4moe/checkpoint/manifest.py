"""manifest.json: what a checkpoint holds and which files it has. It is written last, and its presence is the commit."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt4moe.checkpoint.storage import FileEntry
from gpt4moe.config.optimizer import OptimizerKind
from gpt4moe.config.optimizer_table import OPTIMIZERS, Optimizer
from gpt4moe.config.own_files import plain_name
from gpt4moe.config.typed import FieldError, from_plain, sealed, unsealed
from gpt4moe.data.passed_over import PassedOver
from gpt4moe.durable import sync_folder
from gpt4moe.errors import HEADER, CheckpointError, DamagedCheckpoint, UnreadableCheckpoint

FORMAT = 1
NAME = "manifest.json"
_WRITERS_VERSION = "Use the version that wrote it."
_NOT_ITS = "Use the version that wrote it, or another checkpoint: do not trust one of unknown origin."


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything about a checkpoint but the tensors. It stays small at any size: slices are listed in file headers."""

    step: int
    consumed_samples: int
    consumed_per_source: dict[str, int]
    optimizer_step: int
    run_id: str
    identity: dict[str, Any]
    """What a restart must match (training.identity.identity_of)."""
    config: dict[str, Any]
    """The resolved run configuration."""
    layout: str
    """The writers' layout, for people; no reader needs it."""
    versions: dict[str, str]
    files: list[FileEntry]
    tensor_names: list[str] = field(default_factory=list)
    """KIND/NAME of every weight and buffer that must be there: file headers cannot show that a tensor is missing from
    all of them. Empty in checkpoints written before 2026-11-24, which are not checked for it."""
    base: dict[str, str] | None = None
    """Of a checkpoint with adapters alone: folder and sha256 of the base (checkpoint.base)."""
    recent: dict[str, Any] | None = None
    """Numbers of the steps before (resilience.recent), of a run that skips or stops by them."""
    passed_over: list[list[int]] | None = None
    """Samples that the run went back from and has not read (data.passed_over), of a run that went back."""

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer whose states are stored, by optimizer.kind of the config; AdamW where the config has none.

        Raises: CheckpointError when the table has no such optimizer.
        """
        kind = self.config.get("optimizer", {}).get("kind", OptimizerKind.adamw.value)
        found = next((row for name, row in OPTIMIZERS.items() if name == kind), None)
        if found is None:
            raise CheckpointError(
                f"The checkpoint's optimizer.kind is {kind}, which is none of {', '.join(OPTIMIZERS)}.",
                "Use the version that wrote it, or load its weights alone: checkpoint.load_only=['*'].",
            )
        return found

    @property
    def encoder(self) -> dict[str, Any] | None:
        """encoder_identity (architecture.encoder_folder) of the folder with the image encoder that the run was trained
        with; None: it has no such folder, or was begun before 2026-11-30."""
        found: dict[str, Any] | None = self.identity.get("encoder")
        return found

    def save(self, folder: Path) -> None:
        fields = dataclasses.asdict(self)
        for name in ("base", "recent", "passed_over"):
            if fields[name] is None:
                del fields[name]  # so that the files of other checkpoints stay as they were
        text = sealed(json.dumps({"format": FORMAT, **fields}, indent=1))
        partial = folder / f"{NAME}.tmp"
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / NAME)
        sync_folder(folder)
        sync_folder(folder.parent)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Raises: CheckpointError when there is none, it is damaged, or its format or keys are unknown."""
        path = folder / NAME
        try:
            text = path.read_bytes().decode(errors="replace")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointError(
                f"{folder} is no checkpoint: it has no {NAME}.",
                "Give a step folder like runs/NAME/checkpoints/step-00000100, or a run folder with one.",
            ) from error
        except OSError as error:
            raise UnreadableCheckpoint(path, str(path), error) from error
        body = unsealed(text)
        if body is None:
            raise DamagedCheckpoint(folder, f"{path} is damaged: its sha256 differs.", (NAME, HEADER))
        try:
            fields = json.loads(body)
            if fields.pop("format", None) != FORMAT:
                raise CheckpointError(f"{path} is of another format than {FORMAT}.", _WRITERS_VERSION)
            manifest = from_plain(cls, fields)
            manifest._require_sense()
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} has another content than format {FORMAT}: {error}.", _NOT_ITS) from error
        return manifest

    def _require_sense(self) -> None:
        """Raises: FieldError for values that have their types and cannot be."""
        for number, entry in enumerate(self.files):
            try:
                plain_name(entry.name)
            except FieldError as error:
                raise FieldError(f"files[{number}].name: {error}") from error
            if not 0 < entry.header_bytes <= entry.size or not entry.block_bytes:
                raise FieldError(
                    f"files[{number}] has a header of {entry.header_bytes} in {entry.size} bytes, or no block"
                )
        if len({entry.name for entry in self.files}) < len(self.files):
            raise FieldError("files has a name twice")
        for name in ("optimizer", "model", "run"):
            if not isinstance(self.config.get(name, {}), dict):
                raise FieldError(f"config.{name} is not an object")
        if self.base is not None and set(self.base) != {"folder", "sha256"}:
            raise FieldError("base has other keys than folder and sha256")
        PassedOver.of(self.passed_over or [])
