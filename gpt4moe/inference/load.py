"""A folder's model, ready to map tokens to logits, on any layout. Each rank reads what it holds.

    step or run folder           open_checkpoint  --+
    Hugging Face, to-inference   open_other       --+--> Opened --placed, on the ranks of a layout--> LoadedModel

An image encoder is no part of checkpoints: LoadedModel.latent_maker reads it, where prompts have images.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gpt4moe.architecture.encoder_folder import require_same_encoder
from gpt4moe.architecture.tensors import Box
from gpt4moe.checkpoint.base import refuse_adapters
from gpt4moe.checkpoint.manifest import NAME as MANIFEST
from gpt4moe.checkpoint.reader import CheckpointReader
from gpt4moe.checkpoint.retention import find_checkpoint
from gpt4moe.checkpoint.selection import stored_names
from gpt4moe.config.checksums import file_sha256
from gpt4moe.config.kernels import FusedKernel, KernelsConfig, SwiGluKernel
from gpt4moe.config.load import config_from_dict
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.optimizer import Dtype
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.config.vision import EncoderKind
from gpt4moe.inference.text import Words, words_of_files, words_of_run
from gpt4moe.parallel.agreement import raise_together
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import TIMEOUT, ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import require_legal
from gpt4moe.parallel.shard import Shard

if TYPE_CHECKING:  # it imports DeepSpeed, which looks for an accelerator then (load_chunks)
    from gpt4moe.inference.image_cache import LatentMaker

logger = logging.getLogger(__name__)


class StoredWeights(Protocol):
    """The weights of a folder of another format, as convert.verify.open_weights gives them."""

    folder: Path
    model: ModelConfig
    dtype: str
    """Of safetensors: F32, BF16, F16."""
    shapes: dict[str, tuple[int, ...]]

    def prefer_rank(self, tp_index: int, pp_index: int) -> None:
        """Reads what several files have from that of this rank, where there is one."""

    def values(self, name: str, boxes: list[Box]) -> Iterator[np.ndarray]:
        """The elements of boxes of a tensor, one after the other in C order, in fp32 chunks."""


OpenWeights = Callable[[Path], StoredWeights]
"""Raises: ConversionError or CheckpointError. An argument: the room convert lies beside this one."""


class BoxReader:
    """StoredWeights as model.weights.load_weights reads them: whole shards."""

    def __init__(self, weights: StoredWeights):
        self.weights, self.folder = weights, weights.folder

    def fill_all(self, targets: Iterable[tuple[str, Shard, int, int, Tensor]]) -> None:
        for _, shard, start, end, out in targets:
            assert (start, end) == (0, shard.size), "another format is read in whole shards"
            at = 0
            for values in self.weights.values(shard.name, [(shard.offset, shard.shape)]):
                out[at : at + len(values)] = torch.from_numpy(values)
                at += len(values)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A folder with a model, not loaded yet."""

    run: RunConfig
    """What the model was trained with; of another format than ours, only `model` and the dtype are set."""
    reader: Any
    """A model.weights.TensorReader, with its `folder`."""
    step: int
    words: Callable[[], Words]
    """Raises: DataError when the folder has no tokenizer."""
    names: frozenset[str] | None = None
    """KIND/NAME of what is read; None: everything."""
    encoder: dict[str, Any] | None = None
    """Manifest.encoder."""

    def fingerprint(self) -> str:
        """Another one where the weights are others: of a checkpoint's manifest, which has hashes of its files; of
        another format, of names, sizes and times of its files."""
        folder: Path = self.reader.folder
        if (folder / MANIFEST).exists():
            return file_sha256(folder / MANIFEST)
        files = [*sorted(folder.glob("*.safetensors")), folder / "config.json", folder / "index.json"]
        facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def open_checkpoint(path: Path) -> Opened:
    """A step folder, or a run folder's latest checkpoint, whatever layout wrote it.

    Raises: CheckpointError when there is none or it is damaged.
    """
    reader = CheckpointReader(find_checkpoint(path))
    run = config_from_dict(reader.manifest.config)
    refuse_adapters(reader.folder, reader.manifest)
    return Opened(
        run=run, reader=reader, step=reader.manifest.step, words=lambda: words_of_run(reader.folder, run),
        encoder=reader.manifest.encoder,
    )  # fmt: skip


def open_folder(path: Path, open_weights: OpenWeights) -> Opened:
    """A folder of any format: a step or run folder, a Hugging Face folder, one made by to-inference.

    Raises: CheckpointError or ConversionError when it is none of these, or damaged.
    """
    if (path / MANIFEST).exists() or (path / "checkpoints").is_dir():
        return open_checkpoint(path)
    weights = open_weights(path)
    stored = {"BF16": Dtype.bf16}.get(weights.dtype, Dtype.fp32)
    if (index := path / "index.json").exists():  # checked by open_weights
        run = config_from_dict(json.loads(index.read_text(encoding="utf-8"))["config"])
        run.precision.dtype = stored

        def words() -> Words:
            return words_of_run(path, run)
    else:
        run = RunConfig(model=weights.model)
        run.precision.dtype = stored

        def words() -> Words:
            return words_of_files(path, vocab_size=weights.model.vocab_size, context_length=weights.model.seq_length)

    kinds = ("weight", "buffer")
    names = frozenset(f"{kind}/{name}" for kind in kinds for name in weights.shapes)
    return Opened(run=run, reader=BoxReader(weights), step=0, words=words, names=names)


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedModel:
    """A checkpoint's model on this rank's device, in eval mode, and the config it was trained with."""

    chunks: list[nn.Module]
    """One GPTModel for each virtual stage of this rank; in one process it is the whole model."""
    run: RunConfig
    """With the `parallel` it is loaded for, and the dtype it computes in."""
    step: int
    groups: ProcessGroups
    resampler: nn.Module | None = None
    """The VisionChunk of a vision model."""
    encoder: dict[str, Any] | None = None
    """Manifest.encoder."""

    def latent_maker(self) -> "LatentMaker":
        """For Generator, of a vision model: its encoder is read now, on every rank. Collective. Raises: ConfigError, on
        every rank, for a folder that lacks weights or has another encoder than the model was trained with."""
        from gpt4moe.inference.image_cache import LatentMaker
        from gpt4moe.model.transformer_config import TORCH_DTYPES
        from gpt4moe.model.vision_encoder import FrozenEncoder

        vision, dtype = self.run.model.vision, TORCH_DTYPES[self.run.precision.dtype]
        assert vision is not None and self.resampler is not None, "prompts.Sight refuses images for a text model"
        if vision.encoder.kind is EncoderKind.folder:
            folder = Path(vision.encoder.folder or "")
            with raise_together(self.groups):
                if self.groups.is_first_rank:
                    require_same_encoder(folder, self.encoder)
                    if self.encoder is None:
                        logger.warning("the run does not say which encoder it was trained with: %s is taken", folder)
        encoder = FrozenEncoder(vision.encoder, self.run.run.seed, self.groups.device, dtype)
        return LatentMaker(encoder, self.resampler)

    @property
    def chunk(self) -> nn.Module:
        """The whole model of a rank without stages: (tokens [B, S], positions [B, S], None) -> logits [B, S, V]."""
        (chunk,) = self.chunks
        return chunk


@contextmanager
def loaded_model(
    path: Path, dtype: Dtype | None = None, parallel: ParallelConfig | None = None,
    environment: Environment | None = None,
) -> Iterator[LoadedModel]:  # fmt: skip
    """`placed` for a step folder, or a run folder's latest checkpoint. Raises: CheckpointError, as open_checkpoint."""
    with placed(open_checkpoint(path), dtype, parallel, environment) as model:
        yield model


@contextmanager
def placed(
    opened: Opened, dtype: Dtype | None = None, parallel: ParallelConfig | None = None,
    environment: Environment | None = None, timeout: timedelta = TIMEOUT,
) -> Iterator[LoadedModel]:  # fmt: skip
    """The model of a folder on the ranks of a layout. Collective.

    Args:
        dtype: that it computes in; None: the one it was trained in.
        parallel: the layout to load it onto; None: one process holds all.
        environment: of this rank; None: one process.
        timeout: of a collective.
    Raises: CheckpointError or ConversionError, on every rank, when it is damaged; LayoutError when the model does not
        fit `parallel`.
    """
    run = placed_run(opened, dtype, parallel)
    here = environment or Environment(rank=0, world_size=1, local_rank=0, master=None, source="one process")
    if parallel is not None:
        require_placeable(run, here.world_size)
    with world(here, timeout=timeout) as device:
        layout = Layout.from_config(run.parallel, here.world_size)
        groups = ProcessGroups.create(layout, here.rank, device, run.run.seed, timeout=timeout)
        chunks = load_chunks(opened, run, groups)
        resampler = chunks.pop() if run.model.vision is not None else None
        yield LoadedModel(chunks, run, opened.step, groups, resampler, opened.encoder)


def placed_run(opened: Opened, dtype: Dtype | None = None, parallel: ParallelConfig | None = None) -> RunConfig:
    """The run that a folder's model is built for, as `placed` builds it."""
    run = dataclasses.replace(opened.run, parallel=parallel or ParallelConfig())
    run.precision = dataclasses.replace(run.precision, dtype=dtype or run.precision.dtype)
    # Generation needs our attention; and a package that trained the model may not be installed here.
    given = run.kernels
    swiglu = SwiGluKernel.torch if given.swiglu is SwiGluKernel.torch else SwiGluKernel.auto
    rotary, loss, router = (
        it if it is FusedKernel.torch else FusedKernel.auto for it in (given.rotary, given.cross_entropy, given.router)
    )
    run.kernels = KernelsConfig(
        experts=given.experts, swiglu=swiglu, rotary=rotary, cross_entropy=loss, router=router
    )  # fmt: skip
    return run


def require_placeable(run: RunConfig, world_size: int) -> None:
    """Raises: LayoutError when the model does not fit run.parallel on this many ranks."""
    # With a batch that fits the layout: the one of training has no meaning here.
    batch = world_size * run.parallel.pp
    training = dataclasses.replace(run.training.of_one_size(batch), micro_batch_size=1)
    require_legal(run.model, run.parallel, training, world_size)


@torch.no_grad()
def load_chunks(opened: Opened, run: RunConfig, groups: ProcessGroups) -> list[nn.Module]:
    """The chunks of this rank with the folder's weights, in eval mode; of a vision model the resampler's is the last.
    Each rank reads what it holds. Collective.
    Raises: CheckpointError or ConversionError on every rank when any finds it damaged.
    """
    # Imported here: DeepSpeed looks for an accelerator when it is imported, and `world` has told it which.
    from gpt4moe.model.gpt import build_model

    loaded = frozenset(stored_names(run.model)) if opened.names is None else opened.names
    chunks = build_model(run, groups, loaded=loaded)
    read_chunks(opened, chunks, groups)
    return [chunk.eval() for chunk in chunks]


def read_chunks(opened: Opened, chunks: list[Any], groups: ProcessGroups) -> None:
    """Fills the chunks of this rank from the folder; of one made by to-inference, for its own grid, from the rank's own
    file alone. Collective. Raises: as load_chunks."""
    from gpt4moe.model.weights import load_weights

    if isinstance(opened.reader, BoxReader):
        opened.reader.weights.prefer_rank(groups.coordinate["tp"], groups.coordinate["pp"])
    load_weights(opened.reader, chunks, groups, names=opened.names)
