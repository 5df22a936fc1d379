"""prove: trains a run on its layout and in one process, compares the two, and gives a verdict.

run --shrink--> small run --phases--> ranks of the layout -+
                    \\-> oracle --phases--> one process ----+--> compare --> suspects --> Proof
                                 ^                         |
                                 +-- other tokens, nudges --+  where round-off may explain what differs (round_off)
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.local_ranks import run_ranks
from gpt4moe.proof import bf16, compare, plan, round_off
from gpt4moe.proof.compare import NumberDifference, TensorDifference
from gpt4moe.proof.evidence import DescentEvidence
from gpt4moe.proof.outcome import GRADIENT, Outcome, RankAnswer, assemble
from gpt4moe.proof.plan import Phase
from gpt4moe.proof.shrink import Shrunk, shrink
from gpt4moe.proof.suspects import suspects

SILENCE_SECONDS = 300.0
SETS_OF_TOKENS = 3
ADAMW_NUMBERS = 100
"""How much wider the tolerances of AdamW's losses and norms are: those of later steps carry what Adam made of
round-off."""
Outcomes = dict[str, Outcome]
Start = Callable[[int, dict[str, Phase]], Outcomes]
"""Runs phases of one layout on so many ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """What was compared on one mesh, and what came out."""

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
    """Shards of the first tensor that differs, and the groups that reduce its gradient."""
    starts_at: list[str] = field(default_factory=list)
    """The first output of the forward pass and the last gradient that differ: the fault is there."""
    set_aside: list[str] = field(default_factory=list)
    """Sets of tokens that were set aside, each with the reason."""
    measured: str = ""
    """How the tolerance of AdamW was measured, where it was."""
    undecided: str = ""
    """Why there is no verdict; empty when there is one."""
    clipped_steps: int
    steps: int
    seconds: float

    @property
    def is_equal(self) -> bool:
        return not (self.problems or any(not self.is_phase_equal(phase) for phase in self.tensors))

    @property
    def is_different(self) -> bool:
        return not (self.is_equal or self.undecided)

    @property
    def verdict(self) -> str:
        """equal, different or undecided"""
        return "equal" if self.is_equal else "undecided" if self.undecided else "different"

    def is_phase_equal(self, phase: str) -> bool:
        compared = (*self.tensors[phase], *self.numbers.get(phase, ()))
        return not any(item.is_different for item in compared)


@dataclass(frozen=True, slots=True)
class SetAside:
    """Why a set of tokens was set aside."""

    text: str
    is_tie: bool
    number: str = ""
    """The only one that differed, in bf16."""


def run_on_ranks(
    world_size: int, phases: dict[str, Phase], on_progress: Callable[[str], None] | None = None
) -> Outcomes:
    """The phases of one layout on `world_size` gloo ranks. Raises: local_ranks.RanksFailed."""
    answers = run_ranks(
        world_size, rank_phases, list(phases.values()), timeout_seconds=SILENCE_SECONDS, on_progress=on_progress
    )
    return {name: assemble([answer[at] for answer in answers]) for at, name in enumerate(phases)}


def rank_phases(environment: Environment, phases: list[Phase], say: Callable[[str], Any] = str) -> list[RankAnswer]:
    """ranks.run_phases, imported on the rank alone: the process that asks needs no torch."""
    from gpt4moe.proof.ranks import run_phases

    return run_phases(environment, phases, None, say)


def prove(run: RunConfig, ranks: int | None = None, start: Start = run_on_ranks) -> list[Proof]:
    """One proof, or one for each of the smaller meshes that stand for a large one (proof.mesh).

    Args:
        ranks: the world size to prove; None: the smallest legal one.
        start: runs phases on so many ranks.
    Raises: LayoutError when the trainer refuses the run; local_ranks.RanksFailed when a rank fails or hangs.
    """
    return [prove_shrunk(shrunk, start) for shrunk in shrink(run, ranks)]


def prove_shrunk(shrunk: Shrunk, start: Start) -> Proof:
    """Compares on one set of tokens, and on others where round-off alone may explain what differs on the first."""
    began = time.monotonic()
    aside: list[SetAside] = []
    for tokens in range(SETS_OF_TOKENS):
        want = start(1, plan.phases(shrunk.oracle, 1, tokens))
        got = start(shrunk.layout.world_size, plan.phases(shrunk.run, shrunk.layout.world_size, tokens))
        proof = judge(shrunk, got, want, time.monotonic() - began)
        if _is_adamw_off(proof) and round_off.turned_by_round_off(got[plan.ADAMW], want[plan.ADAMW]) is None:
            nudged = start(1, plan.nudged_phases(shrunk.oracle, tokens))
            proof = judge(shrunk, got, want, time.monotonic() - began, nudged=list(nudged.values()))
        reason = _round_off(proof, got, want)
        if reason is None:
            break
        aside.append(dataclasses.replace(reason, text=f"tokens {tokens + 1}: {reason.text}"))
    undecided = _undecided(aside) if len(aside) == SETS_OF_TOKENS else ""
    return dataclasses.replace(proof, set_aside=[reason.text for reason in aside], undecided=undecided)


def _is_adamw_off(proof: Proof) -> bool:
    """Whether AdamW's tolerance is worth measuring: its phase differs, and plain descent found nothing."""
    return not proof.problems and proof.is_phase_equal(plan.DESCENT) and not proof.is_phase_equal(plan.ADAMW)


def _round_off(proof: Proof, got: Outcomes, want: Outcomes) -> SetAside | None:
    """The round-off that explains every phase that differs; None: nothing differs, or something else does too."""
    if proof.is_equal or proof.problems:
        return None
    if proof.undecided:
        return SetAside(proof.undecided, is_tie=True)
    lines, number, is_tie = [], "", False
    for phase in (phase for phase in proof.tensors if not proof.is_phase_equal(phase)):
        if phase == plan.ROUNDED:
            marginal = round_off.one_marginal(proof.tensors[phase], proof.numbers[phase], bf16.EXACT)
            if marginal is None:
                return None
            number = marginal.name
            lines.append(marginal.text)
            continue
        tie = round_off.turned_by_round_off(got[phase], want[phase])
        first_step = any(item.is_different for item in proof.tensors[phase] if item.kind == GRADIENT)
        if tie is None or (first_step and tie.step > 1):
            return None
        is_tie = True
        lines.append(f"{phase}, {tie.text}")
    return SetAside("; ".join(lines), is_tie, number)


def _undecided(aside: Sequence[SetAside]) -> str:
    """Why no set of tokens decides; empty where the same bf16 number is off in every set, which is no accident."""
    if not any(reason.is_tie for reason in aside) and len({reason.number for reason in aside}) == 1:
        return ""
    return f"in each of {len(aside)} sets of tokens something differs that round-off alone may explain"


def judge(shrunk: Shrunk, got: Outcomes, want: Outcomes, seconds: float, *, nudged: Sequence[Outcome] = ()) -> Proof:
    """The verdict on outcomes that are there.

    Args:
        nudged: runs of the one process from nudged weights (plan.nudged_phases), to measure AdamW's tolerance with.
    """
    tensors = {
        plan.DESCENT: compare.tensor_differences(got[plan.DESCENT], want[plan.DESCENT], compare.DESCENT),
        plan.ADAMW: compare.tensor_differences(got[plan.ADAMW], want[plan.ADAMW], compare.ADAMW),
    }
    numbers = {
        plan.DESCENT: compare.number_differences(got[plan.DESCENT], want[plan.DESCENT]),
        plan.ADAMW: compare.number_differences(got[plan.ADAMW], want[plan.ADAMW], scale=ADAMW_NUMBERS),
    }
    measured, undecided = "", ""
    if nudged:
        measured, undecided = _measure(tensors, numbers, want[plan.ADAMW], nudged)
    if plan.ROUNDED in got:
        draws = [want[name] for name in map(plan.drawn, range(plan.DRAWS))]
        sides = bf16.Sides(got[plan.ROUNDED], draws, want[plan.ADAMW])
        tensors[plan.ROUNDED] = bf16.tensor_differences(sides, shrunk.run)
        numbers[plan.ROUNDED] = bf16.number_differences(sides)
    problems = [f"{phase}: {problem}" for phase, outcome in got.items() for problem in outcome.problems]
    different = [item for items in tensors.values() for item in items if item.is_different]
    first = different[0] if different else None
    suspected: list[str] = []
    starts_at: list[str] = []
    if different or problems or any(item.is_different for items in numbers.values() for item in items):
        evidence = DescentEvidence.of(shrunk.layout, shrunk.run, got, want, tensors[plan.DESCENT])
        suspected, starts_at = suspects(evidence), evidence.starts_at()
        if plan.ROUNDED in got and not suspected:
            compared = tensors[plan.ROUNDED], numbers[plan.ROUNDED]
            suspected = bf16.suspects_in_bf16(shrunk.layout, sides, shrunk.run, *compared)
    clip_norm = shrunk.run.optimizer.clip_norm or plan.CLIP_NORM
    return Proof(
        shrunk=shrunk, tensors=tensors, numbers=numbers, problems=problems, suspects=suspected, first=first,
        where=[] if first is None else whereabouts(first.name, shrunk, got[plan.DESCENT]), starts_at=starts_at,
        measured=measured, undecided=undecided,
        clipped_steps=sum(norm > clip_norm for norm in want[plan.DESCENT].norms), steps=plan.STEPS, seconds=seconds,
    )  # fmt: skip


def _measure(
    tensors: dict[str, list[TensorDifference]], numbers: dict[str, list[NumberDifference]], want: Outcome,
    nudged: Sequence[Outcome],
) -> tuple[str, str]:  # fmt: skip
    """Puts the measured tolerances into the AdamW phase. Returns (how it was measured, why nothing is decided)."""
    used = round_off.same_choices(nudged, want)
    if len(used) < round_off.FEWEST_NUDGED:
        return "", (
            f"AdamW's tolerance could not be measured: {len(nudged) - len(used)} of {len(nudged)} runs of the one "
            "process choose other experts when its weights are moved by one fp32 rounding"
        )
    unbounded = round_off.measured_tensors(tensors[plan.ADAMW], want, used, widest=float("inf"))
    before = max((item.relative for item in tensors[plan.ADAMW] if item.is_different), default=0.0)
    tensors[plan.ADAMW] = round_off.measured_tensors(tensors[plan.ADAMW], want, used)
    numbers[plan.ADAMW] = round_off.measured_numbers(numbers[plan.ADAMW], want, used, ADAMW_NUMBERS)
    is_shaky = any(item.is_different for item in tensors[plan.ADAMW]) and not any(
        item.is_different for item in unbounded
    )
    widest = max(tensors[plan.ADAMW], key=lambda item: item.tolerance)
    return (
        f"AdamW's tolerance was measured, for a tensor was {before:.1e} off: {len(used)} runs of one process, whose "
        f"weights were moved by at most one fp32 rounding, allow up to {widest.tolerance:.1e} ({widest.kind} of "
        f"{widest.name})"
    ), f"one process itself moves more than {round_off.LARGEST_MEASURED:g} by one fp32 rounding" if is_shaky else ""


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
