"""Prompts in, text out: a checkpoint, or a Hugging Face folder, with its tokenizer."""

import json
from pathlib import Path

import torch

from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.retention import find_checkpoint
from gpt4moe.config.load import config_from_dict
from gpt4moe.data.check import check_data, tokenizer_path
from gpt4moe.data.tokenizer import Tokenizer, load_tokenizer
from gpt4moe.errors import ConfigError, DataError
from gpt4moe.inference.generation import generate
from gpt4moe.inference.load import open_model


def write_samples(
    folder: Path, prompts: list[str], *, num_tokens: int, temperature: float, top_p: float, seed: int
) -> list[dict[str, str]]:
    """One {"prompt", "text"} a prompt.

    Args:
        folder: a step folder, a run folder (its latest checkpoint), or a folder made by to-hf.
    Raises: CheckpointError; ConversionError; DataError when the run has no tokenizer, or its data and tokenizer are
        gone; ConfigError for a temperature below 0 or a top_p outside (0, 1].
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ConfigError(f"Temperature {temperature} with top_p {top_p} draws none.", "Set 0 or more, and 0 < p <= 1.")
    tokenizer, context_length = _tokenizer_and_context(folder)
    generator = torch.Generator().manual_seed(seed)
    with open_model(folder) as chunk:
        samples = []
        for prompt in prompts:
            tokens = generate(
                chunk,
                tokenizer.encode(prompt) or [tokenizer.eos_id],
                num_tokens=num_tokens,
                context_length=context_length,
                temperature=temperature,
                top_p=top_p,
                eos_id=tokenizer.eos_id,
                generator=generator,
            )
            samples.append({"prompt": prompt, "text": tokenizer.decode(tokens)})
        return samples


def _tokenizer_and_context(folder: Path) -> tuple[Tokenizer, int]:
    """The folder's own, before anything heavy is loaded."""
    if (folder / "config.json").exists():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return load_tokenizer(folder / "tokenizer.json"), config["max_position_embeddings"]
    run = config_from_dict(Manifest.load(find_checkpoint(folder)).config)
    check_data(run)
    path = tokenizer_path(run)
    if path is None:
        raise DataError("The run was trained on synthetic tokens: it has no tokenizer.", "Use a run on real text.")
    return load_tokenizer(path), run.model.seq_length
