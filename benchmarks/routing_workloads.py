"""Eight workloads of routing, and a recorded one: which experts each token of a step goes to, as arithmetic.

    workload, seed, step, token -> top_k distinct experts, whatever the layout

The names and what each isolates are those of Megatron-LM's open proposal (its pull request 7488, of September 2026).
Tokens are numbered over all ranks, and rank r of R has the r-th R-th part of them. So a workload is one table, and only
its cut differs between layouts. W1, W2 and W3 heat the same number of experts; they differ in where these stand. (In
the proposal's code W1 and W2 are one set, and W3's is twice as wide.)

Letters: T tokens, E experts, K top_k.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt4moe.parallel.rng import counter_uniform, tensor_key

SOURCES = 8
"""Blocks of tokens of W4_source_ragged: block b has (b + 1) / SOURCES of its tokens, the others are padding."""


@dataclass(frozen=True, slots=True)
class Routed:
    """The routing of one step."""

    expert_TK: Tensor
    """int64; the experts of a token are distinct."""
    real_T: Tensor
    """bool; False: padding, which goes to no expert."""

    def part(self, rank: int, ranks: int) -> "Routed":
        """Of one of so many ranks. Raises: ValueError when they do not divide the tokens."""
        if len(self.real_T) % ranks:
            raise ValueError(f"{len(self.real_T)} tokens cannot be cut over {ranks} ranks")
        return Routed(self.expert_TK.chunk(ranks)[rank], self.real_T.chunk(ranks)[rank])

    def counts(self, num_experts: int, ranks: int) -> list[list[int]]:
        """Rows that each rank sends to each expert: [ranks, E]."""
        parts = [self.part(rank, ranks) for rank in range(ranks)]
        return [torch.bincount(it.expert_TK[it.real_T].flatten(), minlength=num_experts).tolist() for it in parts]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What a workload is cut to."""

    num_tokens: int
    """T, over all ranks."""
    num_experts: int
    top_k: int

    @property
    def hot(self) -> int:
        """How many experts are hot."""
        return max(self.top_k, self.num_experts // 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Hot tokens choose among the hot experts, all others among all."""

    isolates: str
    hot_experts: Callable[[Sizes, int, int], Sequence[int]] = lambda sizes, seed, step: range(sizes.num_experts)
    """Sizes, seed, step -> expert numbers, top_k at least."""
    hot_of_four: Callable[[int], int] = lambda step: 3
    """Step -> how many of four neighbouring tokens are hot."""
    is_ragged: bool = False


def _first(sizes: Sizes, seed: int, step: int) -> Sequence[int]:
    return range(sizes.hot)


def _drawn(sizes: Sizes, seed: int, step: int) -> Sequence[int]:
    chance = counter_uniform(tensor_key(seed, "hot experts"), torch.arange(sizes.num_experts))
    return chance.topk(sizes.hot).indices.tolist()


def _spread(sizes: Sizes, seed: int, step: int) -> Sequence[int]:
    return [place * sizes.num_experts // sizes.hot for place in range(sizes.hot)]


def _second_half(sizes: Sizes, seed: int, step: int) -> Sequence[int]:
    return range(min(sizes.num_experts // 2, sizes.num_experts - sizes.top_k), sizes.num_experts)


def _moving(sizes: Sizes, seed: int, step: int) -> Sequence[int]:
    return [(step // 3 * sizes.hot + place) % sizes.num_experts for place in range(sizes.hot)]


BALANCED = "W0_balanced"
WORKLOADS: dict[str, Workload] = {
    BALANCED: Workload(isolates="every expert gets the same: what the others are compared with"),
    "W1_hot_expert_set": Workload(isolates="hot experts, drawn once", hot_experts=_drawn),
    "W2_hot_rank": Workload(isolates="as many hot experts, all on one rank", hot_experts=_first),
    "W3_spread_hot_experts": Workload(isolates="as many hot experts, spread over the ranks", hot_experts=_spread),
    "W4_source_ragged": Workload(isolates="ranks with few tokens and ranks with many", is_ragged=True),
    "W5_zero_expert_rank": Workload(
        isolates="half the experts, so half the ranks, get nothing", hot_experts=_second_half,
        hot_of_four=lambda step: 4,
    ),
    "W6_rotating_hotspot": Workload(isolates="hot experts that move every third step", hot_experts=_moving),
    "W7_burst": Workload(
        isolates="every fourth step half the tokens are hot", hot_experts=_first,
        hot_of_four=lambda step: 2 if step % 4 == 3 else 0,
    ),
}  # fmt: skip


def routed(name: str, sizes: Sizes, *, seed: int, step: int) -> Routed:
    """The routing of a step, from 0: a function of its arguments alone.

    Raises: ValueError when there are fewer experts than top_k.
    """
    if sizes.top_k > sizes.num_experts:
        raise ValueError(f"top_k {sizes.top_k} of {sizes.num_experts} experts")
    workload, token_T = WORKLOADS[name], torch.arange(sizes.num_tokens)
    if name == BALANCED:
        place_TK = token_T.unsqueeze(1) * sizes.top_k + torch.arange(sizes.top_k)
        return Routed(place_TK % sizes.num_experts, torch.ones_like(token_T, dtype=torch.bool))
    counter_TE = token_T.unsqueeze(1) * sizes.num_experts + torch.arange(sizes.num_experts)
    chance_TE = counter_uniform(tensor_key(seed, f"{name} {step}"), counter_TE)
    is_hot_E = torch.zeros(sizes.num_experts, dtype=torch.bool)
    is_hot_E[list(workload.hot_experts(sizes, seed, step))] = True
    is_hot_T = token_T % 4 >= 4 - workload.hot_of_four(step)
    chance_TE = chance_TE.masked_fill(is_hot_T.unsqueeze(1) & ~is_hot_E, -1.0)
    return Routed(chance_TE.topk(sizes.top_k).indices, _real(token_T, is_ragged=workload.is_ragged))


def _real(token_T: Tensor, *, is_ragged: bool) -> Tensor:
    if not is_ragged:
        return torch.ones_like(token_T, dtype=torch.bool)
    num_tokens = len(token_T)
    block_T = token_T * SOURCES // num_tokens
    first_T = -(-block_T * num_tokens // SOURCES)
    return (token_T - first_T) * SOURCES * SOURCES < (block_T + 1) * num_tokens


def replayed(counts: Sequence[Sequence[int]], top_k: int) -> Routed:
    """A routing with exactly the recorded counts of each source, which has as many tokens as they say.

    Which of its tokens goes where is not recorded: the rows of the experts in order are dealt to the tokens in turn, so
    no token gets an expert twice; then the tokens are shuffled, so that a source may be cut.

    Args:
        counts: [sources, E] rows (runlog.routing_record).
    Raises: ValueError when no such routing exists.
    """
    parts = []
    for source, row in enumerate(counts):
        rows = sum(row)
        num_tokens = rows // top_k
        if rows % top_k or max(row) > num_tokens or min(row) < 0:
            raise ValueError(f"source {source}: {rows} rows are no {top_k} distinct experts for each of its tokens")
        expert = torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)).view(top_k, num_tokens).t()
        order = counter_uniform(tensor_key(source, "replayed"), torch.arange(num_tokens)).argsort(stable=True)
        parts.append(expert[order])
    expert_TK = torch.cat(parts)
    return Routed(expert_TK, torch.ones(len(expert_TK), dtype=torch.bool))
