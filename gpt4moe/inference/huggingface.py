"""A Hugging Face folder, run by transformers: a second program's view of an export. Imported where it is used."""

from pathlib import Path

import torch
from torch import Tensor, nn

from gpt4moe.errors import ConversionError


class TheirModel(nn.Module):
    """A model of transformers in the seam of our chunks: (tokens, positions, None) -> logits [B, S, V]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor, mask: None) -> Tensor:
        logits: Tensor = self.model(tokens, position_ids=positions, use_cache=False).logits
        return logits


def load_strictly(folder: Path) -> TheirModel:
    """The model of a folder with a config.json, fp32.

    transformers itself fills what is missing with random numbers and goes on.
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
