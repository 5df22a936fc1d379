"""Next tokens by plain sampling: the whole context is computed again for each token, which is fine for a few lines."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate(
    chunk: nn.Module, prompt: list[int], *, num_tokens: int, context_length: int, temperature: float, top_p: float,
    eos_id: int, generator: torch.Generator,
) -> list[int]:  # fmt: skip
    """Up to `num_tokens` tokens after `prompt`, ending early before `eos_id`.

    Args:
        prompt: at least one token; only the last `context_length` are seen.
        temperature: 0 takes the most probable token always.
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
    # The first token stays always: what counts is the mass before each.
    probability[probability.cumsum(0) - probability >= top_p] = 0
    return int(order[torch.multinomial(probability, 1, generator=generator)])
