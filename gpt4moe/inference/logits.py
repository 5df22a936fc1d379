"""Logits of any folder that something here can run: a checkpoint, or a Hugging Face folder."""

from pathlib import Path
from typing import Any

import torch

from gpt4moe.config.optimizer import Dtype
from gpt4moe.inference.load import open_model


@torch.no_grad()
def folder_logits(folder: Path, prompts: list[list[int]], *, is_rounded: bool = False) -> list[Any]:
    """Of each prompt [S, V], numpy, computed in fp32 whatever the run was trained in.

    Args:
        is_rounded: the weights are rounded to bf16 first, as an export in bf16 has them.
        folder: a step folder, a run folder (its latest checkpoint), or a folder with a config.json.
    Raises: CheckpointError or ConversionError when it is damaged.
    """
    with open_model(folder, Dtype.fp32) as chunk:
        for parameter in chunk.parameters() if is_rounded else ():
            parameter.copy_(parameter.bfloat16())
        batches = [torch.tensor([prompt], device=next(chunk.parameters()).device) for prompt in prompts]
        positions = [torch.arange(batch.shape[1], device=batch.device).unsqueeze(0) for batch in batches]
        return [chunk(*pair, None)[0].float().cpu().numpy() for pair in zip(batches, positions, strict=True)]
