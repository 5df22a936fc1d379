"""The next token from logits: greedy, or drawn by temperature, top-k, top-p, min-p and repetition penalty.

    logits [n, V] -> penalty of repeated tokens -> temperature -> softmax -> top-k -> top-p -> min-p -> inverse of the
    cumulative distribution at a uniform number that is a function of (seed, prompt, sample, position) alone

The distribution is summed in the order of token ids, not of probabilities. Rounding moves a sum by 1e-7, so it changes
the drawn token as rarely. If it were summed in the order of probabilities, two nearly equal tokens might change places,
and layouts would often draw different texts.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from gpt4moe.errors import ConfigError
from gpt4moe.parallel.rng import tensor_key


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a token is drawn. The filters work one after the other, in this order, as transformers' do."""

    temperature: float = 1.0
    """Divides the logits; 0: always the most probable token."""
    top_k: int = 0
    """Among this many most probable tokens; 0: all."""
    top_p: float = 1.0
    """Among the most probable tokens that make up this share (nucleus sampling, arXiv:1904.09751)."""
    min_p: float = 0.0
    """Among tokens with at least this share of the largest probability (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides a positive logit of a token that stood before, multiplies a negative one (arXiv:1909.05858)."""
    seed: int = 0

    def validate(self) -> None:
        """Raises: ConfigError."""
        checks = [
            (
                self.temperature == 0 or 1e-4 <= self.temperature < inf,
                "temperature",
                "Set 0 (greedy), or 1e-4 or more.",
            ),
            (self.top_k >= 0, "top-k", "Set 0 (all tokens) or more."),
            (0 < self.top_p <= 1, "top-p", "Set above 0, at most 1."),
            (0 <= self.min_p <= 1, "min-p", "Set from 0 to 1."),
            (0 < self.repetition_penalty < inf, "repetition-penalty", "Set above 0; 1 changes nothing."),
        ]
        for is_right, name, cure in checks:
            if not is_right:
                raise ConfigError(f"--{name} {getattr(self, name.replace('-', '_'))} draws no token.", cure)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def text_key(sampling: Sampling, prompt: Sequence[int], sample: int, images: Sequence[str] = ()) -> str:
    """What the random numbers of one text follow from: seed, prompt and number of the sample. Not its place in a
    batch or file.

    Args:
        images: digests of the prompt's pictures.
    """
    digest = hashlib.sha256(",".join([*map(str, prompt), *images]).encode()).hexdigest()
    return f"{sampling.seed}/{digest}/{sample}"


def uniform(key: str, position: int) -> float:
    """In [0, 1), 53 bits, of a text's key and the position of the token that is drawn."""
    return (tensor_key(position, key) >> 11) / 2**53


def next_tokens(
    logits: Tensor, settings: Sequence[Sampling], uniforms: Sequence[float], seen: Sequence[Sequence[int]],
    banned: Sequence[Collection[int]] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The next token of each row, and its log-probability under the model's own distribution.

    Args:
        logits: [n, V].
        seen: the tokens that stood before, of each row.
        banned: tokens that must not be drawn, of each row; empty: none of any row.
    Returns: [n] int64; [n] fp32: log softmax of the logits as they are, whatever the settings.
    """
    logits = logits.float()
    logprob = torch.log_softmax(logits, dim=-1)
    if any(one.repetition_penalty != 1 for one in settings):
        logits = _penalised(logits, settings, seen)
    if any(banned):
        logits = logits.clone()
        for row, some in enumerate(banned):
            logits[row, list(some)] = -torch.inf
    chosen = logits.argmax(dim=-1)
    drawn = [row for row, one in enumerate(settings) if not one.is_greedy]
    if drawn:
        which = torch.tensor(drawn, device=logits.device)
        probability = distribution(logits[which], [settings[row] for row in drawn])
        chosen[which] = _draw(probability, [uniforms[row] for row in drawn])
    return chosen, logprob.gather(1, chosen.unsqueeze(1)).squeeze(1)


def distribution(logits: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """What a token is drawn from, [n, V] fp64, after temperature and filters; sums to 1."""

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(one, name) for one in settings], dtype=torch.float64, device=logits.device)[
            :, None
        ]

    probability = torch.softmax(logits.double() / column("temperature"), dim=-1)
    if any(one.top_k or one.top_p < 1 for one in settings):
        value, order = probability.sort(dim=-1, descending=True, stable=True)
        place = torch.arange(value.shape[1], device=value.device)
        top_k = column("top_k")
        value = value.masked_fill((place >= top_k) & (top_k > 0), 0.0)
        before = value.cumsum(dim=-1) - value
        # The most probable token always stays: nothing stands before it.
        value = value.masked_fill(before >= column("top_p") * value.sum(dim=-1, keepdim=True), 0.0)
        probability = torch.zeros_like(probability).scatter_(1, order, value)
    if any(one.min_p for one in settings):
        least = column("min_p") * probability.amax(dim=-1, keepdim=True)
        probability = probability.masked_fill(probability < least, 0.0)
    return probability / probability.sum(dim=-1, keepdim=True)


def _draw(probability: Tensor, uniforms: Sequence[float]) -> Tensor:
    """The token at which the cumulative distribution passes the row's uniform number, [n]."""
    reached = probability.cumsum(dim=-1)
    wanted = torch.tensor(uniforms, dtype=torch.float64, device=reached.device)[:, None] * reached[:, -1:]
    # A rounded sum may end below the number: the last token that has any probability then.
    last = probability.shape[1] - 1 - (probability > 0).flip(-1).int().argmax(dim=-1)
    return torch.searchsorted(reached, wanted, right=True).squeeze(1).minimum(last)


def _penalised(logits: Tensor, settings: Sequence[Sampling], seen: Sequence[Sequence[int]]) -> Tensor:
    logits = logits.clone()
    for row, (one, tokens) in enumerate(zip(settings, seen, strict=True)):
        if one.repetition_penalty != 1:
            which = torch.tensor(sorted(set(tokens)), device=logits.device)
            value = logits[row, which]
            logits[row, which] = torch.where(value > 0, value / one.repetition_penalty, value * one.repetition_penalty)
    return logits
