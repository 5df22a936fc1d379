"""Which tensors a checkpoint of a model must have, and which of them a new run takes. No torch.

    needed by the model, stored, patterns of checkpoint.load_only  ->  loaded | initial values | left in the checkpoint

Every tensor is accounted for: without patterns both sides must have the same tensors, and each pattern must match. The
vision parts alone may be on one side only: a text model becomes a vision model, and a vision model gives its text back.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from gpt4moe.architecture.tensors import logical_buffers, logical_shapes
from gpt4moe.architecture.trained import adapter_shapes, require_matches
from gpt4moe.architecture.vision import is_vision
from gpt4moe.checkpoint.index import CheckpointIndex
from gpt4moe.config.model import ModelConfig
from gpt4moe.errors import CheckpointError
from gpt4moe.parallel.shard import BUFFER, WEIGHT


@dataclass(frozen=True, slots=True)
class Selection:
    """Every tensor of the model, and of the checkpoint, in one of three lists (KIND/NAME, sorted)."""

    loaded: list[str]
    initial: list[str]
    """Tensors of the model that keep their initial values."""
    unused: list[str]
    """Tensors of the checkpoint that are not loaded."""

    def describe(self) -> str:
        """All of it in one line, for the log."""
        parts = [f"{len(self.loaded)} tensors"]
        for names, what in ((self.initial, "from their initial values"), (self.unused, "of the checkpoint not used")):
            if names:
                shown = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
                parts.append(f"{len(names)} {what} ({shown})")
        return "; ".join(parts)


def stored_names(model: ModelConfig) -> list[str]:
    """KIND/NAME of every weight and buffer that a checkpoint of the model must have. The states are the optimizer's.

    With adapters: these alone; base_model has the others.
    """
    if model.lora is not None:
        return [f"{WEIGHT}/{name}" for name in adapter_shapes(model)]
    weights, buffers = (WEIGHT, logical_shapes(model)), (BUFFER, logical_buffers(model))
    return [f"{kind}/{name}" for kind, names in (weights, buffers) for name in names]


def base_model(model: ModelConfig) -> ModelConfig:
    """The model without its adapters."""
    return replace(model, lora=None)


def selection_of(index: CheckpointIndex, model: ModelConfig, patterns: list[str]) -> Selection:
    """What a run with `model` takes from a checkpoint; the same on every rank. Raises: as select."""
    stored = [name for name in index.shapes if name.partition("/")[0] in (WEIGHT, BUFFER)]
    selection = select(index.folder, stored, stored_names(model), patterns)
    if model.vision is not None:
        _require_shapes(index, selection, model)
    return selection


def _require_shapes(index: CheckpointIndex, selection: Selection, model: ModelConfig) -> None:
    """Raises: CheckpointError when a tensor to load is of another size, before anything is built."""
    needed = {f"{WEIGHT}/{name}": shape for name, shape in logical_shapes(model).items()}
    for name in selection.loaded:
        if name in needed and tuple(index.shapes[name]) != needed[name]:
            raise CheckpointError(
                f"{_bare(name)} of {index.folder} is {tuple(index.shapes[name])}; the model's is {needed[name]}.",
                "Set model.* as in its manifest.json, or load another checkpoint.",
            )


def select(folder: Path, stored: Iterable[str], needed: Iterable[str], patterns: list[str]) -> Selection:
    """Which tensors are loaded.

    Args:
        folder: of the checkpoint, for errors.
        stored, needed: names with their kind, as weight/decoder.final_layernorm.weight.
        patterns: of checkpoint.load_only, shell-like, over names without their kind; empty: everything.
    Raises: ConfigError when a pattern matches nothing; CheckpointError when the checkpoint lacks a tensor that should
        be loaded and, without patterns, when it has a tensor that the model does not have.
    """
    has, wants = set(stored), set(needed)
    require_matches("checkpoint.load_only", patterns, [_bare(name) for name in wants])
    loaded = {name for name in wants if not patterns or any(fnmatchcase(_bare(name), p) for p in patterns)}
    if not any(is_vision(_bare(name)) for name in has):  # a text checkpoint: its vision parts begin here
        loaded -= {name for name in wants - has if is_vision(_bare(name))}
    missing = sorted(loaded - has)
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors that the model needs, e.g. {missing[0]}.",
            "Load another checkpoint, or give checkpoint.load_only patterns that leave them out.",
        )
    unused = sorted(has - loaded)
    foreign = unused
    if not any(is_vision(_bare(name)) for name in wants):
        foreign = [name for name in unused if not is_vision(_bare(name))]
    if foreign and not patterns:
        raise CheckpointError(
            f"{folder} has {len(foreign)} tensors that the model has not, e.g. {foreign[0]}: it is of another model.",
            "Check model.* against its manifest.json, or name what to load by checkpoint.load_only.",
        )
    return Selection(sorted(loaded), sorted(wants - loaded), unused)


def _bare(name: str) -> str:
    return name.partition("/")[2]
