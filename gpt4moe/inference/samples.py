"""Prompts in, text out: a checkpoint with its tokenizer."""

from pathlib import Path

import torch

from gpt4moe.data.check import check_data, tokenizer_path
from gpt4moe.data.tokenizer import load_tokenizer
from gpt4moe.errors import ConfigError, DataError
from gpt4moe.inference.generation import generate
from gpt4moe.inference.load import loaded_model


def write_samples(
    checkpoint: Path, prompts: list[str], *, num_tokens: int, temperature: float, top_p: float, seed: int
) -> list[dict[str, str]]:
    """One {"prompt", "text"} a prompt.

    Raises: CheckpointError; DataError when the run has no tokenizer, or its data and tokenizer are gone; ConfigError
        for a temperature below 0 or a top_p outside (0, 1].
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ConfigError(f"Temperature {temperature} with top_p {top_p} draws none.", "Set 0 or more, and 0 < p <= 1.")
    with loaded_model(checkpoint) as model:
        check_data(model.run)
        path = tokenizer_path(model.run)
        if path is None:
            raise DataError("The run was trained on synthetic tokens: it has no tokenizer.", "Use a run on real text.")
        tokenizer = load_tokenizer(path)
        generator = torch.Generator().manual_seed(seed)
        samples = []
        for prompt in prompts:
            tokens = generate(
                model.chunk,
                tokenizer.encode(prompt) or [tokenizer.eos_id],
                num_tokens=num_tokens,
                context_length=model.run.model.seq_length,
                temperature=temperature,
                top_p=top_p,
                eos_id=tokenizer.eos_id,
                generator=generator,
            )
            samples.append({"prompt": prompt, "text": tokenizer.decode(tokens)})
        return samples
