"""Adapters (LoRA) merged into the weights of their base: for a whole checkpoint, and for every conversion. No torch.

checkpoint of adapters --manifest's base--> W + alpha / rank * B A, box by box --> checkpoint, or any conversion
"""

import dataclasses
import hashlib
import json
import uuid
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from gpt4moe.architecture.adapters import is_adapted
from gpt4moe.architecture.names import adapter_names
from gpt4moe.architecture.rows import Shape
from gpt4moe.architecture.tensors import row_of
from gpt4moe.architecture.trained import adapter_shapes
from gpt4moe.chat.words import TOKENIZER_FOLDER
from gpt4moe.checkpoint.base import base_folder
from gpt4moe.checkpoint.index import CheckpointIndex, cover_of_box
from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.retention import find_checkpoint
from gpt4moe.config.checksums import SUMS
from gpt4moe.config.load import config_from_dict, config_to_dict
from gpt4moe.config.run import RunConfig
from gpt4moe.convert.copy_pipeline import progress_bar
from gpt4moe.convert.model_files import Files, kept_files, kept_folder
from gpt4moe.convert.publish import published, refuse_existing
from gpt4moe.convert.safetensors_file import NewTensor, packed
from gpt4moe.convert.weights import CheckpointWeights, text_run
from gpt4moe.errors import ConversionError
from gpt4moe.parallel.shard import BUFFER, WEIGHT

FILE_BYTES = 4 * 10**9

Answer = dict[str, Any]


class MergedWeights(CheckpointWeights):
    """The weights of a base with the adapters of a checkpoint added, in fp32. Those of a vision model are its text
    model's, as CheckpointWeights has them; merge writes the vision parts too.

    Args:
        path: a step folder, or a run folder (its latest), of adapters.
        base: where the base is, if it was moved.
    Raises: CheckpointError when either is damaged, or the base is gone or another one.
    """

    def __init__(self, path: Path, base: Path | None = None):
        self.adapters = CheckpointIndex(find_checkpoint(path))
        manifest = self.adapters.manifest
        if manifest.base is None:
            raise ConversionError(
                f"{self.adapters.folder} is a whole checkpoint, not one of adapters.",
                "Give a run with stage.lora.rank.",
            )
        super().__init__(base_folder(manifest, None if base is None else str(base)))
        self.base = self.index
        self.adapted = config_from_dict(manifest.config)
        self.run = text_run(config_from_dict(_merged_config(self.adapted)))
        self._matrix = cache(self._read)

    @property
    def manifest(self) -> Manifest:
        return self.adapters.manifest

    @property
    def block_hashes(self) -> list[list[str]]:
        files = [entry.block_hashes for index in (self.base, self.adapters) for entry in index.manifest.files]
        return [*files, [f"scale {self.scale}"]]

    def values_added(self, name: str, offset: Shape, shape: Shape) -> np.ndarray | None:
        pair = self.pair(name)
        if pair is None:
            return None
        a, b = pair
        box = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
        is_expert = a.ndim == 3
        a = a[(*box[:1], slice(None), box[-1])] if is_expert else a[:, box[-1]]
        b = b[(*box[:-1], slice(None))]
        if is_expert and b.ndim == 4:
            a = a[:, None]
        return np.float32(self.scale) * (b @ a)

    def pair(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """A and B of a matrix, whole; None: it has no adapter."""
        if name not in self.shapes or not is_adapted(self.adapted.model, name, row_of(name)):
            return None
        a, b = (self._matrix(f"{WEIGHT}/{adapter}") for adapter in adapter_names(name))
        return a, b

    @property
    def scale(self) -> float:
        return self.adapted.stage.lora.scale

    def _read(self, name: str) -> np.ndarray:
        shape = adapter_shapes(self.adapted.model)[name.partition("/")[2]]
        whole = (0,) * len(shape), shape
        wrong = cover_of_box(self.adapters.pieces.get(name, []), *whole)
        if wrong or self.adapters.shape(name) != shape:
            raise ConversionError(
                f"{self.adapters.folder}: {name}: {wrong or 'another shape than its model says'}.",
                "Take another copy: this one is damaged.",
            )
        out = np.full(shape, np.nan, dtype=np.float32)
        for where, values in self.adapters.read_box(name, *whole):
            out[where] = values
        return out


def open_checkpoint(path: Path, base: Path | None = None) -> CheckpointWeights:
    """The weights of a checkpoint of ours; of one with adapters alone, merged with its base.

    Args:
        base: where the base of adapters is, if it was moved; of no meaning for a whole checkpoint.
    Raises: CheckpointError or ConversionError, as CheckpointWeights and MergedWeights.
    """
    return MergedWeights(path, base) if holds_adapters(path) else CheckpointWeights(path)


def holds_adapters(path: Path) -> bool:
    """Whether a step or run folder's checkpoint holds adapters alone. Raises: CheckpointError when there is none."""
    return Manifest.load(find_checkpoint(path)).base is not None


def merge(checkpoint: Path, out: Path, *, base: Path | None = None) -> Answer:
    """Writes adapters and their base as one whole step folder, for checkpoint.load, generation and conversions.

    Raises: ConversionError when `checkpoint` has no adapters, or `out` exists or cannot be written; CheckpointError.
    """
    refuse_existing(out)
    source = MergedWeights(checkpoint, base)
    config = _merged_config(source.adapted)
    names = [name for name in source.base.shapes if name.startswith((f"{WEIGHT}/", f"{BUFFER}/"))]
    sizes = [4 * prod(source.base.shapes[name]) for name in names]
    words = _tokenizer(source)
    contents = [[name, hashlib.sha256(content).hexdigest()] for name, content in sorted(words.items())]
    plan, total = json.dumps(["merge", source.block_hashes, contents]), sum(sizes)
    with published(out, plan, total) as draft, progress_bar(f"to {out.name}", total) as advance:
        entries = []
        for number, part in enumerate(names[place] for place in packed(sizes, FILE_BYTES)):
            metadata = {"shapes": json.dumps({name: source.base.shapes[name] for name in part})}
            tensors = [_new(source, name) for name in part]
            file = f"rank-{number:05d}.safetensors"
            entries.append(draft.tensors(file, tensors, dtype="F32", metadata=metadata, advance=advance))
        for name, content in words.items():
            draft.content(f"{TOKENIZER_FOLDER}/{name}", content)
        if words:
            draft.checksums(f"{TOKENIZER_FOLDER}/{SUMS}")
        theirs = source.adapters.manifest
        dataclasses.replace(
            theirs, run_id=uuid.uuid4().hex, config=config, layout="merged", files=entries, tensor_names=names,
            identity=theirs.identity | {"data": f"merged from {source.adapters.folder.name}"}, base=None,
        ).save(draft.folder)  # fmt: skip
    return {
        "out": str(out), "base": str(source.folder), "tensors": len(names), "parameters": total // 4,
        "size_bytes": total, "files": [{"name": entry.name, "size_bytes": entry.size} for entry in entries],
    }  # fmt: skip


def _tokenizer(source: MergedWeights) -> Files:
    """Of conversations that the adapters learned, or of their base; else it is found by the run's config."""
    folder = kept_folder(source.folder, source.manifest, source.run)
    return {} if folder is None else kept_files(folder)[0]


def _merged_config(adapted: RunConfig) -> dict[str, Any]:
    run = config_from_dict(config_to_dict(adapted))
    run.stage.lora.rank, run.stage.lora.targets, run.model.lora = 0, [], None
    return config_to_dict(run)


def _new(source: MergedWeights, name: str) -> NewTensor:
    bare = name.partition("/")[2]
    shape = source.base.shapes[name]
    whole = [((0,) * len(shape), shape)]
    source.pieces.setdefault(bare, source.base.pieces[name])  # buffers that only training uses, and vision parts
    offset = ",".join("0" * len(shape))
    return NewTensor(f"{name}@{offset}", shape, lambda take: source.values(bare, whole, take))
