"""prove: the run on its layout and in one process, compared.

run --shrink--> small run --phases--> layout ranks -+
                      \-> oracle --phases--> 1 rank -+--> compare --> suspects --> Proof
                                   ^                          | a tie that round-off turned
                                   +-------- other tokens ----+
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.local_ranks import run_ranks
from gpt4moe.proof import bf16, compare, plan
from gpt4moe.proof.compare import NumberDifference, TensorDifference
from gpt4moe.proof.evidence import DescentEvidence
from gpt4moe.proof.outcome import GRADIENT, Outcome, RankAnswer, assemble
from gpt4moe.proof.plan import Phase
from gpt4moe.proof.round_off import turned_by_round_off
from gpt4moe.proof.shrink import Shrunk, shrink
from gpt4moe.proof.suspects import suspects

SILENCE_SECONDS = 300.0
Outcomes = dict[str, Outcome]
Start = Callable[[int, RunConfig, int], Outcomes]
"""Ranks, run, which set of tokens."""
SETS_OF_TOKENS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """What was compared, and what came out."""

    shrunk: Shrunk
    tensors: dict[str, list[TensorDifference]]
    """By phase."""
    numbers: dict[str, list[NumberDifference]]
    problems: list[str]
    """What does not fit together between the layout's own ranks, over all phases."""
    suspects: list[str]
    first: TensorDifference | None
    """The first tensor that differs, in model order: a gradient, if any gradient does."""
    where: list[str] = field(default_factory=list)
    """Of the first: its shards and the groups that reduce it."""
    ties: list[str] = field(default_factory=list)
    """Sets of tokens that were set aside, each with the tie for which."""
    clipped_steps: int
    steps: int
    seconds: float

    @property
    def is_equal(self) -> bool:
        tensors = any(item.is_different for items in self.tensors.values() for item in items)
        numbers = any(item.is_different for items in self.numbers.values() for item in items)
        return not (tensors or numbers or self.problems)

    def is_phase_equal(self, phase: str) -> bool:
        compared = (*self.tensors[phase], *self.numbers.get(phase, ()))
        return not any(item.is_different for item in compared)


def run_on_ranks(
    world_size: int, run: RunConfig, tokens: int = 0, on_progress: Callable[[str], None] | None = None
) -> Outcomes:
    """The phases of `run` on `world_size` gloo ranks. Raises: launch.RanksFailed."""
    wanted = plan.phases(run, world_size, tokens)
    answers = run_ranks(
        world_size, rank_phases, list(wanted.values()), timeout_seconds=SILENCE_SECONDS, on_progress=on_progress
    )
    return {name: assemble([answer[at] for answer in answers]) for at, name in enumerate(wanted)}


def rank_phases(environment: Environment, phases: list[Phase], say: Callable[[str], Any] = str) -> list[RankAnswer]:
    """ranks.run_phases, imported on the rank alone: the process that asks needs no torch."""
    from gpt4moe.proof.ranks import run_phases

    return run_phases(environment, phases, None, say)


def prove(run: RunConfig, ranks: int | None = None, start: Start = run_on_ranks) -> list[Proof]:
    """One proof, or one for each of the smaller meshes that stand for a large one (proof.mesh).

    Raises: LayoutError when the trainer refuses the run; launch.RanksFailed when a rank fails or hangs.

    Args:
        ranks: the world size to prove; None: the smallest legal one.
        start: runs a run's phases on so many ranks.
    """
    return [prove_shrunk(shrunk, start) for shrunk in shrink(run, ranks)]


def prove_shrunk(shrunk: Shrunk, start: Start) -> Proof:
    """With other tokens where a tie in the first ones, and nothing else, made a difference (proof.ties)."""
    began = time.monotonic()
    aside: list[str] = []
    for tokens in range(SETS_OF_TOKENS):
        want = start(1, shrunk.oracle, tokens)
        got = start(shrunk.layout.world_size, shrunk.run, tokens)
        proof = judge(shrunk, got, want, time.monotonic() - began)
        tie = None if proof.is_equal or proof.problems else _only_ties(proof, got, want)
        if tie is None:
            break
        aside.append(f"tokens {tokens + 1}: {tie}")
    return dataclasses.replace(proof, ties=aside)


def _only_ties(proof: Proof, got: Outcomes, want: Outcomes) -> str | None:
    """The ties that explain every phase that differs; None: something else differs too."""
    lines = []
    for phase in (phase for phase in proof.tensors if not proof.is_phase_equal(phase)):
        tie = turned_by_round_off(got[phase], want[phase]) if phase != plan.ROUNDED else None
        first_step = any(item.is_different for item in proof.tensors[phase] if item.kind == GRADIENT)
        if tie is None or (first_step and tie.step > 1):
            return None
        lines.append(f"{phase}, {tie.text}")
    return "; ".join(lines) or None


def judge(shrunk: Shrunk, got: Outcomes, want: Outcomes, seconds: float) -> Proof:
    """The verdict on outcomes that are there."""
    tensors = {
        plan.DESCENT: compare.tensor_differences(got[plan.DESCENT], want[plan.DESCENT], compare.DESCENT),
        plan.ADAMW: compare.tensor_differences(got[plan.ADAMW], want[plan.ADAMW], compare.ADAMW),
    }
    numbers = {
        plan.DESCENT: compare.number_differences(got[plan.DESCENT], want[plan.DESCENT]),
        # Losses and norms of later steps carry what Adam made of round-off.
        plan.ADAMW: compare.number_differences(got[plan.ADAMW], want[plan.ADAMW], scale=100),
    }
    if plan.ROUNDED in got:
        draws = [want[name] for name in map(plan.drawn, range(plan.DRAWS))]
        sides = bf16.Sides(got[plan.ROUNDED], draws, want[plan.ADAMW])
        tensors[plan.ROUNDED] = bf16.tensor_differences(sides, shrunk.run)
        numbers[plan.ROUNDED] = bf16.number_differences(sides)
    different = [item for items in tensors.values() for item in items if item.is_different]
    first = different[0] if different else None
    clip_norm, batch = shrunk.run.optimizer.clip_norm or plan.CLIP_NORM, shrunk.run.training
    micro_batches = batch.global_batch_size // batch.micro_batch_size // shrunk.layout.dp
    evidence = DescentEvidence.of(
        shrunk.layout, micro_batches, got[plan.DESCENT], want[plan.DESCENT], tensors[plan.DESCENT]
    )
    suspected = suspects(evidence)
    if plan.ROUNDED in got and not suspected:
        suspected = bf16.suspects_in_bf16(
            shrunk.layout, sides, shrunk.run, tensors[plan.ROUNDED], numbers[plan.ROUNDED]
        )
    return Proof(
        shrunk=shrunk, tensors=tensors, numbers=numbers,
        problems=[f"{phase}: {problem}" for phase, outcome in got.items() for problem in outcome.problems],
        suspects=suspected,
        first=first, where=[] if first is None else whereabouts(first.name, shrunk, got[plan.DESCENT]),
        clipped_steps=sum(norm > clip_norm for norm in want[plan.DESCENT].norms), steps=plan.STEPS, seconds=seconds,
    )  # fmt: skip


def whereabouts(name: str, shrunk: Shrunk, got: Outcome) -> list[str]:
    """How ranks hold a tensor and which groups sum its gradient."""
    holders = got.holders.get(name, {})
    if not holders:
        return ["no rank holds it"]
    any_copy = next(iter(holders.values()))
    lines = [f"cut: {any_copy.cut}"]
    by_offset: dict[tuple[int, ...], list[int]] = {}
    for rank, copy in holders.items():
        by_offset.setdefault(copy.offset, []).append(rank)
    lines += [f"at {list(offset)}: ranks {ranks}" for offset, ranks in by_offset.items()]
    for group in any_copy.reduced_over:
        members = {tuple(shrunk.layout.members(group, rank)) for rank in holders}
        lines.append(f"gradient summed over {group}: {' '.join(str(list(ranks)) for ranks in sorted(members))}")
    return lines
