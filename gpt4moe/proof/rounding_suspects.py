"""What is likely wrong where a layout is right in fp32 and not in bf16. Heuristics; each says what it saw. No torch."""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import combinations

from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.layout import Layout
from gpt4moe.proof import replay, rounding
from gpt4moe.proof.compare import NumberDifference, TensorDifference, distance, family_of
from gpt4moe.proof.evidence import Evidence
from gpt4moe.proof.outcome import GRADIENT, WEIGHT, gradient_kind
from gpt4moe.proof.rounding import BUFFERS, MADE, SCALE, Sides
from gpt4moe.proof.suspects import suspects


def suspects_in_bf16(
    layout: Layout, sides: Sides, run: RunConfig, tensors: Sequence[TensorDifference],
    numbers: Sequence[NumberDifference],
) -> list[str]:  # fmt: skip
    """One line each; empty when nothing differs."""
    wrong = [item for item in tensors if item.is_different]
    lines = [*_norm(layout, sides, numbers), *_scales(sides, wrong)]
    made = sorted({item.name for item in wrong if item.kind.endswith(MADE)})
    if made and not any(line.startswith("wrong clip norm") for line in lines):
        lines.append(_update(sides, run, made))
    state = [item.name for item in wrong if item.kind == BUFFERS]
    if state:
        lines.append(
            f"router state: {len(state)} buffers, {state[0]} first, are not what the run's own loads make of them "
            "(StepRunner.finish_step)."
        )
    if not lines and (wrong or any(number.is_different for number in numbers)):
        lines.append("no scale, norm or update is wrong: a cast, a sum in bf16, or a bf16 kernel.")
    return [f"in bf16 alone, {line}" for line in lines]


def _norm(layout: Layout, sides: Sides, numbers: Sequence[NumberDifference]) -> Iterator[str]:
    """As in fp32, with the norm that the step's own gradients have."""
    step = next((item.first_step for item in numbers if item.name.endswith(MADE)), 0)
    if step:
        got, right = sides.got, replay.norms(sides.got)[step - 1]
        tensors = got.tensors | {GRADIENT: got.tensors[gradient_kind(step)]}
        at = slice(step - 1, step)
        of_step = {name: getattr(got, name)[at] for name in ("losses", "norms", "routing")}
        seen = dataclasses.replace(got, tensors=tensors, **of_step)
        evidence = Evidence(layout=layout, micro_batches=1, got=seen, want=dataclasses.replace(seen, norms=[right]),
                            different=frozenset())  # fmt: skip
        yield from (line for line in suspects(evidence) if line.startswith("wrong clip norm"))


def _scales(sides: Sides, wrong: Sequence[TensorDifference]) -> Iterator[str]:
    for item in wrong:
        if item.kind == SCALE:
            names = [name for name in sides.exact.gradients if family_of(name) == item.family]
            k = rounding.scale(sides.got.gradients, sides.exact.gradients, names)
            yield (
                f"wrong scale: gradients of {item.family} are {k:.2f} times what they are in fp32, and rounding makes "
                f"{item.tolerance:.2f} more or less of it at most. AdamW's losses hide this."
            )


def _update(sides: Sides, run: RunConfig, names: Sequence[str]) -> str:
    steps = range(1, len(sides.got.losses) + 1)
    listed = f"masters and moments of {len(names)} tensors, {names[0]} first,"
    for count in steps:
        for skipped in combinations(steps, count):
            if _is_replayed(sides, run, names, skipped):
                taken = " and ".join(map(str, skipped))
                return f"skipped update: {listed} are as if step {taken} had not been taken."
    return f"wrong update: {listed} are not what clipping and AdamW make of the run's own gradients."


def _is_replayed(sides: Sides, run: RunConfig, names: Sequence[str], skipped: Sequence[int]) -> bool:
    made = replay.replay(sides.got, run, skipped)
    ours = sides.got.tensors | {WEIGHT: replay.moved(sides.got)}
    return all(
        distance(ours[kind][name], made[kind][name]) <= tolerance
        for kind, tolerance in rounding.REPLAYED.items() for name in names
    )  # fmt: skip
