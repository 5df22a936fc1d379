"""A folder's model in this process, tokens to logits: ours, or transformers' own as the second opinion on an export."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt4moe.config.optimizer import Dtype
from gpt4moe.errors import ConversionError
from gpt4moe.inference.load import loaded_model

_CURE = "An export of ours: make it again with to-hf. Another folder: download it whole, in safetensors."


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
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        raise ConversionError(f"transformers cannot load {folder}: {why}.", _CURE) from error
    for what, names in info.items():
        if names:
            raise ConversionError(
                f"{folder} does not fit its config.json: {what.replace('_', ' ')} {sorted(map(str, names))[0]}.", _CURE
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
