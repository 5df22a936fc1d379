"""The second opinion on a conversion: logits of our model and of transformers on the same tokens, fp32, on one rank."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks

TOKENS = np.random.default_rng(0).integers(0, 256, (3, 24))


def our_logits(checkpoint: Path) -> np.ndarray:
    """[3, 24, V] of a checkpoint."""
    return run_ranks(1, _ours, checkpoint)[0]


def their_logits(folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """[3, 24, V] of a Hugging Face folder, and what its loading had to say."""
    return run_ranks(1, _theirs, folder)[0]


@torch.no_grad()
def _ours(environment: Environment, checkpoint: Path) -> np.ndarray:
    from gpt4moe.inference.load import loaded_model

    with loaded_model(checkpoint) as model:
        tokens = torch.from_numpy(TOKENS)
        return model.chunk(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None).float().numpy()


@torch.no_grad()
def _theirs(environment: Environment, folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    found = {key: sorted(map(str, value)) for key, value in info.items()}
    return model(torch.from_numpy(TOKENS)).logits.numpy(), found
