"""A model's weights in one process: of a checkpoint, whatever layout wrote it, or of a Hugging Face folder."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from gpt4moe.checkpoint.reader import CheckpointReader
from gpt4moe.checkpoint.retention import find_checkpoint
from gpt4moe.checkpoint.storage import BUFFER, WEIGHT
from gpt4moe.config.load import config_from_dict
from gpt4moe.config.optimizer import Dtype
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedModel:
    """A whole model on one device, ready to answer, and the config it was trained with."""

    chunk: nn.Module
    run: RunConfig
    step: int


@contextmanager
def open_model(folder: Path, dtype: Dtype | None = None) -> Iterator[nn.Module]:
    """What answers for a folder, (tokens, positions, None) -> logits [B, S, V]: transformers, in fp32, where there is a
    config.json, else our model.

    Args:
        dtype: that our model computes in; None: the one it was trained in.
    Raises: CheckpointError or ConversionError when it is damaged.
    """
    if (folder / "config.json").exists():
        from gpt4moe.inference.huggingface import load_strictly

        yield load_strictly(folder)
        return
    with loaded_model(folder, dtype) as ours:
        yield ours.chunk


@contextmanager
def loaded_model(path: Path, dtype: Dtype | None = None) -> Iterator[LoadedModel]:
    """The model of a step folder, or of a run folder's latest checkpoint.

    Args:
        dtype: that it computes in; None: the one it was trained in.
    Raises: CheckpointError when there is none or it is damaged.
    """
    reader = CheckpointReader(find_checkpoint(path))
    run = config_from_dict(reader.manifest.config)
    run.parallel = ParallelConfig()
    run.precision.dtype = dtype or run.precision.dtype
    environment = Environment(rank=0, world_size=1, local_rank=0, master=None, source="one process")
    with world(environment) as device:
        # Imported here: DeepSpeed looks for an accelerator when it is imported, and `world` has told it which.
        from gpt4moe.model.gpt import build_model
        from gpt4moe.model.parameters import buffers, shards

        groups = ProcessGroups.create(Layout.from_config(run.parallel, 1), 0, device, run.run.seed)
        (chunk,) = build_model(run, groups)
        with torch.no_grad():
            for parameter, shard, _ in shards([chunk], groups):
                reader.fill(f"{WEIGHT}/{shard.name}", shard, 0, shard.size, parameter.view(-1))
            for buffer, shard in buffers([chunk], groups):
                reader.fill(f"{BUFFER}/{shard.name}", shard, 0, shard.size, buffer.view(-1))
        yield LoadedModel(chunk.eval(), run, reader.manifest.step)
