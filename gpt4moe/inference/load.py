"""A folder's model, ready to map tokens to logits: ours from a checkpoint, transformers' from a Hugging Face folder.

checkpoint, of any layout --CheckpointReader--> build_model on the ranks of `parallel` --load_weights--> chunks
folder with a config.json --transformers, strictly--> TheirModel
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt4moe.checkpoint.reader import CheckpointReader
from gpt4moe.checkpoint.retention import find_checkpoint
from gpt4moe.checkpoint.selection import stored_names
from gpt4moe.config.load import config_from_dict
from gpt4moe.config.optimizer import Dtype
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import ConversionError
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import require_legal


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedModel:
    """A checkpoint's model on this rank's device, in eval mode, and the config it was trained with."""

    chunks: list[nn.Module]
    """One GPTModel for each virtual stage of this rank; in one process it is the whole model."""
    run: RunConfig
    """With the `parallel` it is loaded for, and the dtype it computes in."""
    step: int
    groups: ProcessGroups

    @property
    def chunk(self) -> nn.Module:
        """The whole model of a rank that holds one chunk: (tokens [B, S], positions [B, S], None) -> logits [B, S, V]
        without pipeline stages."""
        (chunk,) = self.chunks
        return chunk


@contextmanager
def open_model(folder: Path, dtype: Dtype | None = None) -> Iterator[nn.Module]:
    """A folder's model in this process, (tokens, positions, None) -> logits [B, S, V]: transformers', in fp32, where
    there is a config.json, else ours.

    Args:
        dtype: that our model computes in; None: the one it was trained in.
    Raises: CheckpointError or ConversionError when it is damaged.
    """
    if (folder / "config.json").exists():
        yield load_strictly(folder)
        return
    with loaded_model(folder, dtype) as ours:
        yield ours.chunk


@contextmanager
def loaded_model(
    path: Path,
    dtype: Dtype | None = None,
    parallel: ParallelConfig | None = None,
    environment: Environment | None = None,
) -> Iterator[LoadedModel]:
    """The model of a step folder, or of a run folder's latest checkpoint, whatever layout wrote it. Collective.

    Args:
        dtype: that it computes in; None: the one it was trained in.
        parallel: the layout to load it onto; None: one process holds all.
        environment: of this rank; None: one process.
    Raises: CheckpointError, on every rank, when there is none or it is damaged; LayoutError when the model does not
        fit `parallel`.
    """
    reader = CheckpointReader(find_checkpoint(path))
    run = config_from_dict(reader.manifest.config)
    run.parallel = parallel or ParallelConfig()
    run.precision.dtype = dtype or run.precision.dtype
    here = environment or Environment(rank=0, world_size=1, local_rank=0, master=None, source="one process")
    if parallel is not None:
        # The layout is checked with a batch that fits it: the one of training has no meaning here.
        batch = here.world_size * run.parallel.pp
        training = dataclasses.replace(run.training, micro_batch_size=1, global_batch_size=batch)
        require_legal(run.model, run.parallel, training, here.world_size)
    with world(here) as device:
        # Imported here: DeepSpeed looks for an accelerator when it is imported, and `world` has told it which.
        from gpt4moe.model.gpt import build_model
        from gpt4moe.model.weights import load_weights

        layout = Layout.from_config(run.parallel, here.world_size)
        groups = ProcessGroups.create(layout, here.rank, device, run.run.seed)
        chunks = build_model(run, groups, loaded=frozenset(stored_names(run.model)))
        with torch.no_grad():
            load_weights(reader, chunks, groups)
        yield LoadedModel([chunk.eval() for chunk in chunks], run, reader.manifest.step, groups)


class TheirModel(nn.Module):
    """A model of transformers with the signature of our chunks: (tokens, positions, None) -> logits [B, S, V]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor, mask: None) -> Tensor:
        logits: Tensor = self.model(tokens, position_ids=positions, use_cache=False).logits
        return logits


def load_strictly(folder: Path) -> TheirModel:
    """transformers' model of a folder with a config.json, fp32: an independent reading of an export.

    transformers alone would fill a missing tensor with random numbers and go on.
    Raises: ConversionError when a tensor is missing, left over or of another shape, or transformers refuses.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        raise ConversionError(f"transformers cannot load {folder}: {why}.", "Export it again with to-hf.") from error
    for what, names in info.items():
        if names:
            raise ConversionError(
                f"{folder} does not fit its config.json: {what.replace('_', ' ')} {sorted(map(str, names))[0]}.",
                "Export it again with to-hf.",
            )
    return TheirModel(model.eval())


@torch.no_grad()
def folder_logits(folder: Path, prompts: list[list[int]], *, is_rounded: bool = False) -> list[Any]:
    """Logits [S, V] of each prompt, numpy, computed in fp32 whatever the run was trained in.

    Args:
        folder: a step folder, a run folder (its latest checkpoint), or a folder with a config.json.
        is_rounded: the weights are rounded to bf16 first, as an export in bf16 has them.
    Raises: CheckpointError or ConversionError when it is damaged.
    """
    with open_model(folder, Dtype.fp32) as chunk:
        for parameter in chunk.parameters() if is_rounded else ():
            parameter.copy_(parameter.bfloat16())
        batches = [torch.tensor([prompt], device=next(chunk.parameters()).device) for prompt in prompts]
        positions = [torch.arange(batch.shape[1], device=batch.device).unsqueeze(0) for batch in batches]
        return [chunk(*pair, None)[0].float().cpu().numpy() for pair in zip(batches, positions, strict=True)]
