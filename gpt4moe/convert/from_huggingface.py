"""Hugging Face folder -> a step folder of ours for `checkpoint.load`; a dense model may become a mixture of experts.

The step folder has weights only, so Adam's moments start at zero. Each Hugging Face tensor is copied in chunks, so
nothing larger than a chunk is in memory.
"""

import dataclasses
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from math import inf, isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from gpt4moe.architecture.names import ROUTER
from gpt4moe.architecture.rows import Shape
from gpt4moe.architecture.tensors import Box
from gpt4moe.chat.words import TOKENIZER_FOLDER
from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.storage import StoredPiece
from gpt4moe.config.checksums import SUMS, read_sums
from gpt4moe.config.load import config_to_dict, load_run_config
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoEConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.convert.copy_pipeline import progress_bar
from gpt4moe.convert.folder_tensors import mistral_files, own_path, stored_tensors
from gpt4moe.convert.hf_config import from_config
from gpt4moe.convert.huggingface import add_pieces, open_huggingface, read_config
from gpt4moe.convert.model_files import GENERATION, KEPT, generation_of, require_unchanged
from gpt4moe.convert.publish import Draft, published, refuse_existing
from gpt4moe.convert.safetensors_file import NewTensor, Take, packed
from gpt4moe.convert.tables import UPCYCLED
from gpt4moe.convert.vision_folder import FOLDER
from gpt4moe.convert.vision_import import imported_vision
from gpt4moe.convert.weights import FolderWeights, TypedPiece, Weights
from gpt4moe.data.folder import TOKENIZER_NAME
from gpt4moe.data.tokenizer import load_backend
from gpt4moe.errors import ConversionError, DataError
from gpt4moe.parallel.shard import WEIGHT

FILE_BYTES = 4 * 10**9
ARGUMENTS = "model.args"
"""File with the model's settings as arguments of a run that begins with it."""
_NEW = "new routers"

Answer = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Upcycling:
    """How a dense model becomes a mixture of experts (sparse upcycling, arXiv:2212.05055).

    Every expert is a copy of the dense MLP, and the weights of the chosen experts sum to 1. So at first the mixture
    computes the same as the dense model, whatever its random routers choose.
    """

    num_experts: int
    top_k: int = 2
    noise: float = 0.0
    """Standard deviation of the noise added to every expert but the first, as a share of model.init_std."""
    seed: int = 1234

    def __post_init__(self) -> None:
        if not 0 <= self.noise < inf:
            raise ConversionError(f"--upcycle-noise {self.noise} is no share.", "Give 0 or more, such as 0.1.")


def from_huggingface(source: Path, out: Path, upcycling: Upcycling | None = None) -> Answer:
    """Converts a folder of a known architecture; with `upcycling`, a dense one into a mixture of experts.

    Raises: ConversionError when the folder is damaged or of an unknown architecture, or `out` exists or cannot be
        written.
    """
    refuse_existing(out)
    generation, notes = generation_of(source, read_config(source))
    _require_tokenizer(source)
    text = open_huggingface(source) if upcycling is None else _upcycled(source, upcycling)
    seen = imported_vision(source, text.model, out)
    boxes = _boxes(text) + (_boxes(seen.weights) if seen else [])
    sizes = [4 * prod(box[1]) for _, _, box in boxes]
    size = sum(sizes) + (seen.encoder_bytes if seen else 0)
    shapes = text.shapes | (seen.weights.shapes if seen else {})
    config = config_to_dict(_run_of(seen.model if seen else text.model))
    how = dataclasses.asdict(upcycling) if upcycling else None
    plan = json.dumps(["from-hf", str(source.resolve()), config, how, _state_of(source)])
    with published(out, plan, size) as draft, ExitStack() as stack:
        _require_whole(source)
        advance = stack.enter_context(progress_bar(f"to {out.name}", size))
        entries = []
        for number, part in enumerate(boxes[place] for place in packed(sizes, FILE_BYTES)):
            header = json.dumps({f"{WEIGHT}/{name}": shapes[name] for _, name, _ in part})
            tensors = [_new(weights, name, box) for weights, name, box in part]
            file = f"rank-{number:05d}.safetensors"
            entries.append(draft.tensors(file, tensors, dtype="F32", metadata={"shapes": header}, advance=advance))
        encoder = {"encoder": seen.write_encoder(draft, advance)} if seen else {}
        _keep_tokenizer(source, draft, generation)
        draft.text(ARGUMENTS, " ".join(_arguments(config["model"], "model")) + "\n")
        Manifest(
            step=0, consumed_samples=0, consumed_per_source={}, optimizer_step=0, run_id=uuid.uuid4().hex,
            identity={"model": config["model"], "data": f"converted from {source.resolve().name}", "tokenizer": "none"}
            | encoder,
            config=config, layout="converted", versions={"safetensors": version("safetensors")}, files=entries,
            tensor_names=[f"{WEIGHT}/{name}" for name in shapes],
        ).save(draft.folder)  # fmt: skip
    notes += [
        f"{name} was not read: it holds the same weights in Mistral's own format." for name in mistral_files(source)
    ]
    notes += seen.notes() if seen else []
    stage = "stage=vision " if seen else ""
    return {
        "out": str(out), "model": config["model"], "tensors": len(shapes), "parameters": sum(sizes) // 4,
        "size_bytes": size, "files": [{"name": entry.name, "size_bytes": entry.size} for entry in entries],
        "notes": notes, "train_with": f"{stage}checkpoint.load={out} $(cat {out / ARGUMENTS})",
    }  # fmt: skip


def _boxes(weights: Weights) -> list[tuple[Weights, str, Box]]:
    return [(weights, name, (piece.offset, piece.shape)) for name, listed in weights.pieces.items() for piece in listed]


def _new(weights: Weights, name: str, box: Box) -> NewTensor:
    key = f"{WEIGHT}/{name}@{','.join(map(str, box[0]))}"

    def values(take: Take) -> Iterator[np.ndarray]:
        for chunk in weights.values(name, [box], take):
            if not (isfinite(chunk.max()) and isfinite(chunk.min())):  # both are NaN where one value is
                files = ", ".join(sorted({piece.file for piece in weights.pieces[name]}))
                raise ConversionError(
                    f"{weights.folder}: {name} has a value that is not finite ({files}).",
                    "Download the folder again; if its publisher's file is so, the model is damaged.",
                )
            yield chunk

    return NewTensor(key, box[1], values)


def _arguments(settings: dict[str, Any], group: str) -> Iterator[str]:
    """key=value of every setting, as a shell reads words without quotes."""
    if settings.get("vision") is not None:
        yield "+vision@model.vision=tiny"  # there are none by default; every value of it follows
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _arguments(value, f"{group}.{key}")
        elif key not in ("name", "lora", "planned"):
            yield f"{group}.{key}={json.dumps(value, separators=(',', ':')).strip(chr(34))}"


def _run_of(model: ModelConfig) -> RunConfig:
    """The config of a run that was never trained; a new run loads only weights and model settings from it."""
    run = load_run_config([
        "run.name=converted", "data=mock", "training.steps=1", "training.global_batch_size=1", "optimizer.lr=1e-5",
        "schedule.total_steps=1", "schedule.warmup_steps=0",
        *(["stage=vision", "+vision@model.vision=tiny"] if model.vision is not None else []),
    ])  # fmt: skip
    run.model = model
    run.validate()
    return run


def _state_of(source: Path) -> list[list[object]]:
    """Names, sizes and times of the source's files. If they change, a conversion starts anew."""
    listed = [*source.iterdir(), *(source / FOLDER).rglob("*")]
    files = [(path, path.stat()) for path in sorted(listed) if path.is_file()]
    return [[path.relative_to(source).as_posix(), status.st_size, status.st_mtime_ns] for path, status in files]


def _require_tokenizer(source: Path) -> None:
    """Checks the tokenizer's files before anything is converted. Raises: ConversionError for a link that leads out of
    the folder, or a tokenizer.json that is none."""
    for name in KEPT:
        own_path(source / name)
    path = source / TOKENIZER_NAME
    try:
        if os.path.lexists(path):
            load_backend(path)
    except DataError as error:
        raise ConversionError(error.cause, "Copy or download it again.") from error


def _require_whole(source: Path) -> None:
    """Raises: ConversionError for a file that is not what the folder's SHA256SUMS says."""
    names = read_sums(source) or {}
    size = sum((source / name).stat().st_size for name in names if (source / name).is_file())
    with progress_bar(f"sha256 of {source.name}", size) as advance:
        require_unchanged(source, advance)


def _keep_tokenizer(source: Path, draft: Draft, generation: bytes) -> None:
    """Copies the source's tokenizer files and special ids into the step folder, so that to-hf can export them."""
    draft.content(f"{TOKENIZER_FOLDER}/{GENERATION}", generation)
    for path in (source / name for name in KEPT if (source / name).is_file()):
        draft.copy(f"{TOKENIZER_FOLDER}/{path.name}", own_path(path))
    draft.checksums(f"{TOKENIZER_FOLDER}/{SUMS}")


def _upcycled(source: Path, upcycling: Upcycling) -> FolderWeights:
    """The weights of a dense folder, read as a mixture of copies with random routers."""
    dense = from_config(read_config(source), source.resolve().name)
    if dense.moe is not None:
        raise ConversionError(
            f"{source} is a mixture already, of {dense.moe.num_experts} experts.", "Leave out --upcycle-experts."
        )
    assert dense.ffn_hidden_size is not None  # from_config
    moe = MoEConfig(num_experts=upcycling.num_experts, ffn_hidden_size=dense.ffn_hidden_size, top_k=upcycling.top_k)
    model = dataclasses.replace(dense, moe=moe, ffn_hidden_size=None)
    model.validate()
    tensors, places, files = stored_tensors(source)
    weights = _NoisyWeights(source, model, "F32")
    weights.upcycling = upcycling
    weights.files.update(files)
    add_pieces(weights, UPCYCLED, tensors, places)
    names = [name for name in weights.shapes if name.endswith(ROUTER)]
    rows = np.random.default_rng(upcycling.seed).standard_normal((len(names), *weights.shapes[names[0]]), np.float32)
    weights.files[_NEW] = _InMemory((rows * np.float32(model.init_std)).view(np.uint8).reshape(-1))
    for number, name in enumerate(names):
        weights.pieces[name] = [TypedPiece(_NEW, (0, 0), weights.shapes[name], number * rows[0].nbytes, "F32")]
    return weights


@dataclass(frozen=True, slots=True)
class _InMemory:
    data: np.ndarray

    def read(self, start: int, end: int) -> np.ndarray:
        return self.data[start:end]


class _NoisyWeights(FolderWeights):
    """Adds noise to every expert but the first; the same numbers for the same seed and chunk."""

    upcycling: Upcycling

    def read_run(self, piece: StoredPiece, at: Shape, size: Shape) -> np.ndarray:
        values = super().read_run(piece, at, size)
        is_expert = len(at) > 2  # only experts' matrices have a third dimension
        if not (self.upcycling.noise and is_expert and at[0]):
            return values
        place = f"{piece.file} {piece.start} {at}".encode()
        generator = np.random.default_rng([self.upcycling.seed, xxhash.xxh3_64_intdigest(place)])
        scale = np.float32(self.upcycling.noise * self.model.init_std)
        return values + scale * generator.standard_normal(size, np.float32)
