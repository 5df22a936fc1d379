"""Prompts in, text out, with a folder's own tokenizer and plain sampling.

Each token costs a forward pass over the whole context (there is no cache), which is fine for a few lines.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.retention import find_checkpoint
from gpt4moe.config.load import config_from_dict
from gpt4moe.data.check import check_data
from gpt4moe.data.tokenizer import Tokenizer, load_tokenizer
from gpt4moe.errors import ConfigError, DataError
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
    """The folder's tokenizer and longest context, found before anything heavy is loaded."""
    if (folder / "config.json").exists():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return load_tokenizer(folder / "tokenizer.json"), config["max_position_embeddings"]
    run = config_from_dict(Manifest.load(find_checkpoint(folder)).config)
    path = check_data(run).tokenizer
    if path is None:
        raise DataError("The run was trained on synthetic tokens: it has no tokenizer.", "Use a run on real text.")
    return load_tokenizer(path), run.model.seq_length


@torch.no_grad()
def generate(
    chunk: nn.Module, prompt: list[int], *, num_tokens: int, context_length: int, temperature: float, top_p: float,
    eos_id: int, generator: torch.Generator,
) -> list[int]:  # fmt: skip
    """Up to `num_tokens` tokens after `prompt`; ends before `eos_id`, which is left out.

    Args:
        chunk: (tokens [1, S], positions [1, S], None) -> logits [1, S, V].
        prompt: at least one token; only the last `context_length` are seen.
        temperature: 0 always takes the most probable token.
        top_p: sample among the most probable tokens that make up this share (nucleus sampling, arXiv:1904.09751).
        generator: on the CPU; the only randomness.
    """
    device = next(chunk.parameters()).device
    tokens = list(prompt)
    for _ in range(num_tokens):
        window = torch.tensor([tokens[-context_length:]], device=device)
        positions = torch.arange(window.shape[1], device=device).unsqueeze(0)
        logits = chunk(window, positions, None)[0, -1]
        token = next_token(logits.float().cpu(), temperature=temperature, top_p=top_p, generator=generator)
        if token == eos_id:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def next_token(logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token id from logits [V], fp32."""
    if temperature == 0:
        return int(logits.argmax())
    probability, order = torch.softmax(logits / temperature, dim=-1).sort(descending=True)
    # The first token is always kept: what counts is the mass before each.
    probability[probability.cumsum(0) - probability >= top_p] = 0
    return int(order[torch.multinomial(probability, 1, generator=generator)])
