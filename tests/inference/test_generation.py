"""Sampling: what temperature, top_p and the end of text do; no randomness but the generator's."""

import torch
from torch import Tensor, nn

from gpt4moe.inference.generation import generate, next_token

LOGITS = torch.tensor([0.0, 3.0, 2.0, -1.0])


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class _CountsUp(nn.Module):
    """The token after n is n + 1; remembers the longest context it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.longest = 0

    def forward(self, tokens: Tensor, positions: Tensor, mask: None) -> Tensor:
        self.longest = max(self.longest, tokens.shape[1])
        return torch.nn.functional.one_hot(tokens + 1, 50).float() * 100


def test_temperature_zero_takes_the_most_probable_token() -> None:
    assert next_token(LOGITS, temperature=0, top_p=1.0, generator=_generator()) == 1


def test_top_p_keeps_the_smallest_set_that_makes_up_the_share() -> None:
    drawn = {next_token(LOGITS, temperature=1.0, top_p=0.9, generator=_generator(seed)) for seed in range(200)}
    assert drawn == {1, 2}  # 0.70 and 0.26; the third would start at 0.96


def test_a_tiny_top_p_still_leaves_one_token() -> None:
    assert next_token(LOGITS, temperature=1.0, top_p=1e-9, generator=_generator()) == 1


def test_the_same_seed_draws_the_same_token() -> None:
    first = [next_token(LOGITS, temperature=2.0, top_p=1.0, generator=_generator(7)) for _ in range(3)]
    assert len(set(first)) == 1


def test_generation_ends_before_the_end_of_text_and_sees_only_its_context() -> None:
    model = _CountsUp()
    settings = {"temperature": 0.0, "top_p": 1.0, "generator": _generator(), "context_length": 4}
    assert generate(model, [3, 4], num_tokens=10, eos_id=8, **settings) == [5, 6, 7]
    assert generate(model, [3, 4], num_tokens=6, eos_id=49, **settings) == [5, 6, 7, 8, 9, 10]
    assert model.longest == 4
