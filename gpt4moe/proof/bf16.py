"""bf16: compares a bf16 run with one process, where rounding alone makes two right layouts differ. numpy, no torch.

    forward, backward     got <-> exact    held to how far one process in bf16 (rounded) is from fp32 (exact):
                                           loss, auxiliary losses, loads, every gradient, the scale of each family's,
                                           masters and moments
    from gradients on     got <-> replay   held to fp32, for there a bf16 run is fp32 too: norm, clipping, masters and
                                           moments follow from the run's own gradients, a router's buffers from its own
                                           loads (proof.replay)

How far one process in bf16 is from fp32 is chance: rounding turns some choices of experts. So one process runs several
times (Phase.nudge). A tensor passes up to round_off.TIMES the larger of its own root mean square over these runs and of
its family's over all layers.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.layout import Layout
from gpt4moe.proof.compare import (
    FLOOR,
    NumberDifference,
    TensorDifference,
    by_family,
    distance,
    excess,
    family_of,
    floor_of,
    model_order,
    number_difference,
    root_mean_square,
    total_norm,
)
from gpt4moe.proof.evidence import DescentEvidence
from gpt4moe.proof.first_step import norm_suspects
from gpt4moe.proof.outcome import BUFFER, GRADIENT, WEIGHT, Outcome, gradient_kind
from gpt4moe.proof.replay import MEAN, MEAN_OF_SQUARES, REPLAYED, Tensors, buffers, moved, norms, replay, update_line
from gpt4moe.proof.round_off import TIMES, few

ONE_ROUNDING = 2.0**-8
"""bf16 has eight bits. No tolerance is below three of these, for one process may be near fp32 by luck."""
SCALE_FLOOR = 8 * ONE_ROUNDING
GRADIENTS, SCALE, MADE = "bf16 gradient", "bf16 scale", "of its own gradients"
BUFFERS = f"bf16 {BUFFER}"
ALL_EXPERTS = "tokens of all experts"
EXACT = (MADE, BUFFERS, ALL_EXPERTS)
"""Endings of what rounding does not move."""
_BUFFER_TOLERANCE = 1e-5
"""Of what fp64 makes of a run's own loads: three sums in fp32."""


@dataclass(frozen=True, slots=True)
class Sides:
    """The outcomes to compare, all by the run's optimizer and with every_gradient."""

    got: Outcome
    """The layout in bf16."""
    drawn: list[Outcome]
    """One process in bf16, several times."""
    exact: Outcome
    """One process in fp32."""

    def tensors(self, kind: str) -> tuple[Tensors, list[Tensors], Tensors]:
        return self.got.tensors[kind], [side.tensors[kind] for side in self.drawn], self.exact.tensors[kind]

    def moved(self) -> tuple[Tensors, list[Tensors], Tensors]:
        return moved(self.got), [moved(side) for side in self.drawn], moved(self.exact)


def tensor_differences(sides: Sides, run: RunConfig) -> list[TensorDifference]:
    """Gradients, the worst of the steps, and the scale of the first step's; masters, moments and buffers after the
    last."""
    got, exact = sides.got, sides.exact
    gradients = [sides.tensors(gradient_kind(step)) for step in range(1, len(exact.losses) + 1)]
    found = _worst([_held_to_rounding(GRADIENTS, *step) for step in gradients])
    found += _held_scales(*gradients[0])
    found += _held_to_rounding(f"bf16 {WEIGHT}", *sides.moved())
    for kind in (MEAN, MEAN_OF_SQUARES):
        found += _held_to_rounding(f"bf16 {kind}", *sides.tensors(kind))
    made, ours = replay(got, run), got.tensors | {WEIGHT: moved(got)}
    for kind, tolerance in REPLAYED.items():
        floor = FLOOR * total_norm(made[kind])
        found += [TensorDifference(name, f"bf16 {kind} {MADE}", _apart(name, ours[kind], made[kind], floor), tolerance)
                  for name in _names(ours[kind], made[kind])]  # fmt: skip
    names = _names(got.tensors[BUFFER], exact.tensors[BUFFER])
    of_loads = buffers(got, names, run)
    return found + [TensorDifference(name, BUFFERS, _apart(name, got.tensors[BUFFER], of_loads, 0.0), _BUFFER_TOLERANCE)
                    for name in of_loads]  # fmt: skip


def number_differences(sides: Sides) -> list[NumberDifference]:
    """Losses, norms and routing of every step."""
    got, exact = sides.got, sides.exact
    losses = [name for name in exact.extras if name.endswith("loss")]
    total = float(exact.columns(None)[0].sum())
    moved_loads = root_mean_square([_by_step(side.columns(None), exact.columns(None)) for side in sides.drawn])
    held: dict[str, tuple[Callable[[Outcome], Sequence[float | np.ndarray]], float]] = {
        "loss": (lambda side: side.losses, ONE_ROUNDING),
        # The load-balancing loss is linear in the loads: what moves those moves it, by half as much at most where seen.
        "auxiliary losses": (lambda side: side.columns(losses), max(ONE_ROUNDING, moved_loads / 2)),
        # A choice that moved leaves one expert and reaches another.
        "tokens per expert": (lambda side: side.columns(None), few(total) * 2**0.5 / (total or 1.0)),
    }
    found = []
    for name, (read, floor) in held.items():
        ours, *drawn = (_by_step(read(side), read(exact)) for side in (got, *sides.drawn))
        found.append(number_difference(name, ours, TIMES * max(root_mean_square(drawn), floor)))
    routed, wanted = ([table.sum(axis=1) for table in side.columns(None)] for side in (got, exact))
    found.append(number_difference(ALL_EXPERTS, _by_step(routed, wanted), 0.0))
    return [*found, number_difference(f"gradient norm {MADE}", _by_step(got.norms, norms(got)), 1e-6)]


def _by_step(ours: Sequence[float | np.ndarray], reference: Sequence[float | np.ndarray]) -> list[float]:
    return [distance(np.asarray(a), np.asarray(b)) for a, b in zip(ours, reference, strict=True)]


def hidden_factors(meshes: Sequence[Sequence[TensorDifference]]) -> str:
    """How large a fault in bf16 alone may be and still look like rounding, in words; the largest of the meshes."""
    together = [item for tensors in meshes for item in tensors]
    scales = {item.family: 0.0 for item in together if item.kind == SCALE}
    for item in (item for item in together if item.kind == SCALE):
        scales[item.family] = max(scales[item.family], 1 + item.tolerance)
    one = max((item for item in together if item.kind == GRADIENTS), key=lambda item: item.tolerance)
    listed = ", ".join(f"{family} {factor:.2f}" for family, factor in scales.items())
    return (
        f"factors in bf16 alone that rounding hides: on all gradients of a family up to {listed}; on one tensor's up "
        f"to {1 + one.tolerance:.2f} ({one.name}); none on the norm, clipping and the optimizer's step, which are fp32"
    )


def scale(ours: Tensors, exact: Tensors, names: Sequence[str]) -> float:
    """k where `names` together are k times what they are in fp32 and something orthogonal to it; infinite where one is
    missing or anything is not finite."""
    if np.isinf(_apart_together(ours, exact, names)):
        return float("inf")
    got, want = (_together(side, names) for side in (ours, exact))
    return float(got @ want) / float(want @ want)


def _together(side: Tensors, names: Sequence[str]) -> np.ndarray:
    return np.concatenate([side[name].astype(np.float64).ravel() for name in names])


def _apart_together(ours: Tensors, exact: Tensors, names: Sequence[str]) -> float:
    if any(np.isinf(_apart(name, ours, exact, 0.0)) for name in names):
        return float("inf")
    return distance(_together(ours, names), _together(exact, names))


def _held_to_rounding(kind: str, got: Tensors, drawn: list[Tensors], exact: Tensors) -> list[TensorDifference]:
    norm, found = total_norm(exact), []
    # Gates with the floor of fp32: without it the smallest gate's rounding would be what all gates may differ by.
    floors = {name: floor_of(kind.removeprefix("bf16 "), tensor, norm) for name, tensor in exact.items()}
    for names in by_family(_names(got, exact)).values():
        own = {name: [_apart(name, side, exact, floors.get(name, 0.0)) for side in drawn] for name in names}
        spread = root_mean_square(list(own.values()))
        passes = {name: TIMES * max(root_mean_square(own[name]), spread) for name in names}
        found += [
            TensorDifference(name, kind, _apart(name, got, exact, floors.get(name, 0.0)), passes[name])
            for name in names
        ]
    return sorted(found, key=lambda item: model_order(item.name))


def _held_scales(got: Tensors, drawn: list[Tensors], exact: Tensors) -> list[TensorDifference]:
    """One for each family, under the name of its first tensor: a mean over all of its elements, which rounding moves
    far less than it moves each; half as much at most on all layouts of the tests."""
    least, found = FLOOR * total_norm(exact), []
    for names in by_family(_names(got, exact)).values():
        is_felt = total_norm({name: exact[name] for name in names if name in exact}) > least
        ours, *own = (abs(scale(side, exact, names) - 1) if is_felt else 0.0 for side in (got, *drawn))
        rest = root_mean_square([_apart_together(side, exact, names) for side in drawn]) if is_felt else 0.0
        found.append(TensorDifference(names[0], SCALE, ours, max(SCALE_FLOOR, TIMES * root_mean_square(own), rest / 2)))
    return found


def _worst(steps: list[list[TensorDifference]]) -> list[TensorDifference]:
    return [max(of_one, key=excess) for of_one in zip(*steps, strict=True)]


def _names(*sides: Tensors) -> list[str]:
    return sorted(set().union(*sides), key=model_order)


def _apart(name: str, ours: Tensors, reference: Tensors, floor: float) -> float:
    both = name in ours and name in reference and ours[name].shape == reference[name].shape
    return distance(ours[name], reference[name], floor) if both else float("inf")


def suspects_in_bf16(
    layout: Layout, sides: Sides, run: RunConfig, tensors: Sequence[TensorDifference],
    numbers: Sequence[NumberDifference],
) -> list[str]:  # fmt: skip
    """One line each; empty when nothing differs."""
    wrong = [item for item in tensors if item.is_different]
    lines = [*_norm(layout, run, sides, numbers), *_scales(sides, wrong)]
    made = sorted({item.name for item in wrong if item.kind.endswith(MADE)})
    if made and not any(line.startswith("wrong clip norm") for line in lines):
        lines.append(update_line(sides.got, run, made))
    state = [item.name for item in wrong if item.kind == BUFFERS]
    if state:
        lines.append(
            f"router state: {len(state)} buffers, {state[0]} first, are not what the run's own loads make of them "
            "(StepRunner.finish_step)."
        )
    if not lines and (wrong or any(number.is_different for number in numbers)):
        lines.append("no scale, norm or update is wrong: a cast, a sum in bf16, or a bf16 kernel.")
    return [f"in bf16 alone, {line}" for line in lines]


def _norm(layout: Layout, run: RunConfig, sides: Sides, numbers: Sequence[NumberDifference]) -> Iterator[str]:
    """As in fp32, with the norm that the step's own gradients have."""
    step = next((item.first_step for item in numbers if item.name.endswith(MADE)), 0)
    if step:
        got, right = sides.got, norms(sides.got)[step - 1]
        tensors = got.tensors | {GRADIENT: got.tensors[gradient_kind(step)]}
        at = slice(step - 1, step)
        of_step = {name: getattr(got, name)[at] for name in ("losses", "norms", "routing")}
        seen = dataclasses.replace(got, tensors=tensors, **of_step)
        want = dataclasses.replace(seen, norms=[right])
        evidence = DescentEvidence(layout=layout, run=run, got=seen, want=want, different=frozenset())
        yield from norm_suspects(evidence)


def _scales(sides: Sides, wrong: Sequence[TensorDifference]) -> Iterator[str]:
    for item in wrong:
        if item.kind == SCALE:
            names = [name for name in sides.exact.gradients if family_of(name) == item.family]
            k = scale(sides.got.gradients, sides.exact.gradients, names)
            yield (
                f"wrong scale: gradients of {item.family} are {k:.2f} times what they are in fp32, and rounding makes "
                f"{item.tolerance:.2f} more or less of it at most. AdamW's losses hide this."
            )
