"""StepAttention: attention of a step's tokens to their own rows, whose earlier keys and values are in the cache.

    query and key [T, G, R + 1, D] -> rotary embedding -> keys and values into the cache
    query [T, G, R, D] of a part -> [n, Q, N, D]    Q new tokens of each of n rows

    rows that begin           their keys are the new ones; causal
    rows of one new token     keys from the cache, no causal mask; the heads of a group are queries of one head of keys
    a row that goes on        keys from the cache; causal, the queries at the last positions

Shapes: T packed tokens, N heads and G query groups of this rank, R = N / G, D head size.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpt4moe.inference.batch import Part, Step
from gpt4moe.inference.cache import KeyValueCache
from gpt4moe.inference.image_cache import StepImages
from gpt4moe.model.attention import CausalAttention


@dataclass(slots=True)
class StepAttention:
    """What a chunk's layers attend by in one step (model.attention.CachedAttention)."""

    step: Step
    cache: KeyValueCache
    images: StepImages | None = None
    """What gated blocks of a vision model attend to; None: no token of the step has an image."""
    qkv_format: str = "rows"
    rotary: tuple[Tensor, Tensor] | None = field(default=None, init=False)
    """The step's cosines and sines, [T, 1, 1, D]: equal for all layers, so Stages makes them once (rotary_factors)."""

    def attend(
        self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None,
        causal: CausalAttention,
    ) -> Tensor:  # fmt: skip
        assert self.rotary is not None, "Stages sets it"
        num_heads = query.shape[2]
        both = _rotated(torch.cat((query, key), dim=2), *self.rotary)[:, 0]
        grouped = both[:, :num_heads].unflatten(1, (self.cache.num_groups, -1))
        return self._attend(layer_number, grouped, both[:, num_heads:], value[:, 0], scale, causal)

    def attend_mixed(self, layer_number: int, mixed: Tensor, *, scale: float | None, causal: CausalAttention) -> Tensor:
        assert self.rotary is not None, "Stages sets it"
        heads = mixed.view(len(mixed), self.cache.num_groups, -1, self.cache.head_size)
        both = _rotated(heads[:, :, :-1], *self.rotary)
        return self._attend(layer_number, both[:, :, :-1], both[:, :, -1], heads[:, :, -1], scale, causal)

    def _attend(
        self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None,
        causal: CausalAttention,
    ) -> Tensor:  # fmt: skip
        """query [T, G, R, D], key and value [T, G, D], after the rotary embedding -> [T, 1, N * D]."""
        num_real, heads = self.step.num_real, (query.shape[1] * query.shape[2], query.shape[3])
        if num_real:
            self.cache.append(layer_number, key[:num_real], value[:num_real], self.step.slots)
        out = None
        for part in self.step.parts:
            if part.tables is None:
                found = _begin(part, query.flatten(1, 2), key, value, causal)
            elif part.tokens.shape[1] == 1:
                found = self._one(layer_number, part, query, scale)
            else:
                found = self._more(layer_number, part, query.flatten(1, 2), causal)
            if part.is_whole_step:
                return found.view(-1, 1, heads[0] * heads[1])
            if out is None:
                out = query.new_zeros(len(query), *heads)
            if part.real is None:
                out[part.tokens.flatten()] = found.flatten(0, 1)
            else:
                out[part.tokens[part.real]] = found[part.real]
        if out is None:  # dummies alone
            out = query.new_zeros(len(query), *heads)
        return out.flatten(1).unsqueeze(1)

    def _one(self, layer_number: int, part: Part, query: Tensor, scale: float | None) -> Tensor:
        """[n, 1, N, D] of rows with one new token each."""
        assert part.tables is not None
        key, value = self.cache.read(layer_number, part.tables, part.num_keys)
        q = query if part.is_whole_step else query[part.tokens[:, 0]]
        out = torch.nn.functional.scaled_dot_product_attention(q, key, value, attn_mask=part.mask, scale=scale)
        return out.reshape(len(q), 1, -1, q.shape[3])

    def _more(self, layer_number: int, part: Part, query: Tensor, causal: CausalAttention) -> Tensor:
        """[1, Q, N, D] of one row, some of whose prompt is in the cache."""
        assert part.tables is not None
        key, value = (x.permute(2, 0, 1, 3) for x in self.cache.read(layer_number, part.tables, part.num_keys))
        return _causal(query[part.tokens].transpose(0, 1), key, value, causal)


def _begin(part: Part, query: Tensor, key: Tensor, value: Tensor, causal: CausalAttention) -> Tensor:
    """[n, Q, N, D] of rows without a cache. What stands behind a row's last token is seen by none of it."""
    q, k, v = (x[part.tokens].transpose(0, 1) for x in (query, key, value))
    return _causal(q, k, v, causal)


def _causal(query: Tensor, key: Tensor, value: Tensor, causal: CausalAttention) -> Tensor:
    """query [Q, n, N, D], key and value [keys, n, G, D] -> [n, Q, N, D]."""
    out = causal(query, key, value)
    return out.view(*query.shape).transpose(0, 1)


def rotary_factors(inverse: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (arXiv:2104.09864) at these positions alone, each [T, 1, 1, D]; the
    sines of the first half with their minus.

    Args:
        inverse: inv_freq of Megatron's RotaryEmbedding, [D / 2].
    """
    angle = torch.outer(positions.to(inverse.dtype), inverse)[:, None, None]
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, ..., D], whose halves are pairs: (a, b) -> (a cos - b sin, b cos + a sin), as Megatron's rope_utils."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin
