"""compare: the relative difference of every tensor and number of two outcomes, in model order. numpy, no torch.

    |got - want| / max(|want|, floor)     per tensor; without the floor, round-off in a tiny tensor would count

Tolerances are round-off of fp32 sums in another order, seen on every layout of the tests, times about five; a lost
rank or a wrong scale moves a tensor by 0.1 and more. bf16 has its own comparison (proof.bf16).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from gpt4moe.architecture.names import split_name
from gpt4moe.architecture.rows import Family
from gpt4moe.architecture.tensors import family_of as family_in_table
from gpt4moe.proof.outcome import BUFFER, GRADIENT, WEIGHT, Outcome

FAMILIES = (*(family.label for family in Family), "other")
"""Tensors that are compared together, in the order of the forward pass; `other`: not in the table of tensors."""
# A tensor's norm counts as at least this share of all tensors' together.
FLOOR = 1e-4
NUMBER_FLOOR = 1e-1
"""The same of a gradient of one element (a gate's) and its moments. It is one sum over all tokens and channels, most of
which cancels, so its round-off follows the size of the terms and not of the sum: 1.6e-7 of the norm of all gradients
was measured (dp4-etp2), which is 2e-5 of a gate's gradient that is 1/120 of it. Of such a gate a fault of 1.2e-4 still
shows."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The largest relative difference that passes, and the reason for its size."""

    value: float
    reason: str


# Kind of tensor after clipped descent; after AdamW; numbers of a step.
DESCENT = {
    GRADIENT: Tolerance(1e-5, "fp32 sums in another order"),
    BUFFER: Tolerance(0.0, "a router's buffers come from counts"),
    WEIGHT: Tolerance(1e-5, "fp32 sums in another order, three steps on"),
}
ADAMW = {
    WEIGHT: Tolerance(1e-4, "Adam divides by the gradient's own size: where that is near zero, round-off is a step"),
    "exp_avg": Tolerance(1e-4, "means of gradients whose weights differ by that much"),
    "exp_avg_sq": Tolerance(1e-4, "means of squared gradients"),
}
NUMBERS = {
    "loss": Tolerance(1e-6, "an fp32 mean in another order"),
    "gradient norm": Tolerance(1e-6, "summed in fp64; only the gradients' own round-off"),
    "auxiliary losses": Tolerance(1e-5, "fp32 sums over a micro-batch in another order"),
    "router statistics": Tolerance(1e-5, "dropped assignments, entropy, margin: sums over tokens in another order"),
    "tokens per expert": Tolerance(0.0, "counts"),
}


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor of one kind."""

    name: str
    kind: str
    relative: float
    tolerance: float

    @property
    def is_different(self) -> bool:
        return is_beyond(self.relative, self.tolerance)

    @property
    def family(self) -> str:
        return family_of(self.name)


@dataclass(frozen=True, slots=True)
class NumberDifference:
    """One number of every step."""

    name: str
    relative: float
    """The largest of the steps."""
    tolerance: float
    first_step: int
    """That differs, from 1; 0: none."""

    @property
    def is_different(self) -> bool:
        return is_beyond(self.relative, self.tolerance)


def is_beyond(relative: float, tolerance: float) -> bool:
    """Whether a number is a difference. NaN is one. Nothing passes a tolerance that is not finite."""
    return not relative <= tolerance < float("inf")


def family_of(name: str) -> str:
    """One of FAMILIES."""
    family = family_in_table(name)
    return FAMILIES[-1] if family is None else family.label


def model_order(name: str) -> tuple[int, int, int]:
    """Embedding, resampler, layers, final norm, output layer; within a layer in the order of its forward pass."""
    layer, _ = split_name(name)
    place = FAMILIES.index(family_of(name))
    section = 1 if layer is not None else (0 if place < FAMILIES.index(Family.gates.label) else 2)
    return section, layer or 0, place


def distance(ours: np.ndarray, reference: np.ndarray, floor: float = 0.0) -> float:
    """|ours - reference| / max(|reference|, floor), in fp64; of a zero reference without a floor, |ours|.

    Infinite when either side has a NaN or an infinity: such a number equals nothing, not even itself.
    """
    got, wanted = ours.astype(np.float64), reference.astype(np.float64)
    if not (np.isfinite(got).all() and np.isfinite(wanted).all()):
        return float("inf")
    scale = max(float(np.linalg.norm(wanted)), floor)
    return float(np.linalg.norm(got - wanted)) / (scale or 1.0)


def tensor_differences(got: Outcome, want: Outcome, tolerances: dict[str, Tolerance]) -> list[TensorDifference]:
    """Every tensor of every kind in `tolerances`, in model order; one that only one side has is infinitely far."""
    found = []
    for kind, tolerance in tolerances.items():
        ours, theirs = got.tensors[kind], want.tensors[kind]
        norm = total_norm(theirs)
        for name in sorted(ours.keys() | theirs.keys(), key=model_order):
            both = name in ours and name in theirs and ours[name].shape == theirs[name].shape
            relative = distance(ours[name], theirs[name], floor_of(kind, theirs[name], norm)) if both else float("inf")
            found.append(TensorDifference(name, kind, relative, tolerance.value))
    return found


def floor_of(kind: str, tensor: np.ndarray, norm: float) -> float:
    """What the norm of a tensor counts as at least.

    Args:
        norm: of all tensors of this kind together.
    """
    return norm * (NUMBER_FLOOR if tensor.size == 1 and kind != WEIGHT else FLOOR)


def total_norm(tensors: dict[str, np.ndarray]) -> float:
    """Of all that are finite; the others are differences of their own."""
    wide = [value.astype(np.float64) for value in tensors.values()]
    return float(np.sqrt(sum(float(np.square(value).sum()) for value in wide if np.isfinite(value).all())))


def number_differences(got: Outcome, want: Outcome, *, scale: float = 1.0) -> list[NumberDifference]:
    """Losses, norms and routing of every step. `scale` widens the tolerances."""
    losses = [name for name in want.extras if name.endswith("loss")]
    others = [name for name in want.extras if name not in losses]
    columns = {"auxiliary losses": losses, "router statistics": others, "tokens per expert": None}
    found = [_number("loss", got.losses, want.losses, scale), _number("gradient norm", got.norms, want.norms, scale)]
    found += [_number(name, got.columns(these), want.columns(these), scale) for name, these in columns.items()]
    return found


def _number(
    name: str, got: Sequence[float | np.ndarray], want: Sequence[float | np.ndarray], scale: float
) -> NumberDifference:
    relative = [distance(np.asarray(a), np.asarray(b)) for a, b in zip(got, want, strict=True)]
    return number_difference(name, relative, NUMBERS[name].value * scale)


def number_difference(name: str, relative: Sequence[float], tolerance: float) -> NumberDifference:
    """Args:
    relative: how far each step's number is.
    """
    first = next((step for step, value in enumerate(relative, 1) if is_beyond(value, tolerance)), 0)
    return NumberDifference(name, float(np.max(relative)), tolerance, first)


def by_family(names: Iterable[str]) -> dict[str, list[str]]:
    """Family -> its tensors, in the order given."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(family_of(name), []).append(name)
    return families


def root_mean_square(values: Sequence[float] | Sequence[Sequence[float]]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def excess(item: TensorDifference | NumberDifference) -> float:
    """How near a tensor comes to its tolerance, above 1 beyond it; infinite where either is."""
    if np.isinf(item.relative) or not item.tolerance:
        return np.inf if item.relative else 0.0
    return np.inf if np.isinf(item.tolerance) else item.relative / item.tolerance
