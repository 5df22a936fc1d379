"""What of the descent and AdamW phases differs from one process, in the terms that suspects are found by. No torch.

a forward fault   starts at the first output, in the order of the forward pass, that differs
a backward fault  starts at the last gradient, in that order, that differs: every gradient before it is made of it
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gpt4moe.architecture.rows import Spread
from gpt4moe.architecture.tensors import has_spread
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.layout import Layout
from gpt4moe.proof.compare import TensorDifference, distance, model_order
from gpt4moe.proof.outcome import GRADIENT, PARTS, START, Outcome, Place
from gpt4moe.proof.plan import ADAMW, DESCENT

LANGUAGE_MODEL = "language model's loss"
_AXES = ("tp", "cp", "dp", "ep", "etp", "expert_dp", "pp", "vpp")
_REST = 1e-3
"""A gradient is k times another when what remains is at most this share of it."""
_WRONG_OUTPUT = 1e-3
"""Of the root mean square of a part's outputs: fp32 sums in another order move a token by 1e-5 at most."""


@dataclass(frozen=True, slots=True)
class WrongOutput:
    """The first part of the forward pass whose output differs in the first step."""

    layer: int
    part: str
    tokens: int
    """Whose output is wrong."""
    of_tokens: int
    positions: tuple[int, ...]
    """Where in their sequences they stand."""
    is_exchanged: bool
    """Every wrong token's output is the right one of another token."""

    @property
    def where(self) -> str:
        layer = "" if self.part in ("embedding", "token loss") else f" of layer {self.layer}"
        first, last = self.positions[0], self.positions[-1]
        return f"{self.part}{layer}, for {self.tokens} of {self.of_tokens} tokens, at positions {first} to {last}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DescentEvidence:
    """The descent phase on the layout (got) and in one process (want)."""

    layout: Layout
    run: RunConfig
    got: Outcome
    want: Outcome
    different: frozenset[str]
    """Tensors whose gradient of the first step differs."""
    adamw: tuple[Outcome, Outcome] | None = None
    """The AdamW phase on both sides."""

    @classmethod
    def of(
        cls, layout: Layout, run: RunConfig, got: dict[str, Outcome], want: dict[str, Outcome],
        tensors: Iterable[TensorDifference],
    ) -> "DescentEvidence":  # fmt: skip
        """Args:
        got, want: the phases by name.
        tensors: the descent phase's.
        """
        different = frozenset(item.name for item in tensors if item.kind == GRADIENT and item.is_different)
        return cls(layout=layout, run=run, got=got[DESCENT], want=want[DESCENT], different=different,
                   adamw=(got[ADAMW], want[ADAMW]))  # fmt: skip

    def starts_at(self) -> list[str]:
        """Where the first step begins to differ, forward and backward, in words."""
        wrong, gradient = self.first_output(), self.last_gradient
        lines = [] if wrong is None else [f"first output that differs: {wrong.where}"]
        return lines + ([] if gradient is None else [f"last gradient that differs: {gradient}"])

    @property
    def micro_batches(self) -> int:
        """Of a rank."""
        batch = self.run.training
        return batch.global_batch_size // batch.micro_batch_size // self.layout.dp

    @property
    def last_gradient(self) -> str | None:
        """The last of the differing gradients in the order of the forward pass."""
        return max(self.different, key=model_order, default=None)

    @property
    def wrong_weights(self) -> list[str]:
        """Weights that are not one process's before the first step, in model order."""
        got, want = (side.tensors.get(START, {}) for side in (self.got, self.want))
        names = [name for name in want if name not in got or not np.array_equal(got[name], want[name])]
        return sorted(names, key=model_order) if got else []

    def first_output(self) -> WrongOutput | None:
        """Where the forward pass of the first step begins to differ; None where nothing was noted or differs."""
        for place in sorted(self.want.outputs.keys() & self.got.outputs.keys(), key=_forward_order):
            got, want = self.got.outputs[place], self.want.outputs[place]
            if got.shape != want.shape:
                continue
            size = float(np.sqrt(np.nanmean(np.square(want, dtype=np.float64))))
            wrong = np.nanmax(np.abs(got - want), axis=-1, initial=0.0) > _WRONG_OUTPUT * (size or 1.0)
            if wrong.any():
                positions = tuple(int(at) for at in np.unique(np.nonzero(wrong)[1]))
                seen = want.reshape(-1, want.shape[-1])
                nearest = [np.abs(seen - one).max(axis=1).min() for one in got[wrong]]
                return WrongOutput(*place, tokens=int(wrong.sum()), of_tokens=wrong.size, positions=positions,
                                   is_exchanged=bool(np.max(nearest) <= _WRONG_OUTPUT * size))  # fmt: skip
        return None

    def router_parts(self, name: str) -> dict[str, float] | None:
        """How many times what it should be each part of a router's gradient is: that of the language model's loss and
        those of its layer's auxiliary losses; None where they do not explain the gradient."""
        right = self.want.gradients[name].astype(np.float64)
        parts = {key: value.astype(np.float64) for key, value in self.want.loss_parts.get(name, {}).items()}
        parts = {key: value for key, value in parts.items() if np.linalg.norm(value) > 0}
        rest = right - np.sum(list(parts.values()), axis=0) if parts else right
        parts = {LANGUAGE_MODEL: rest} | parts
        columns = np.stack([value.ravel() for value in parts.values()], axis=1)
        got = self.got.gradients[name].astype(np.float64).ravel()
        if got.shape[0] != columns.shape[0] or not np.isfinite(got).all():
            return None
        times, *_ = np.linalg.lstsq(columns, got, rcond=None)
        if distance(columns @ times, got) > _REST:
            return None
        return dict(zip(parts, map(float, times), strict=True))

    @property
    def families(self) -> dict[str, frozenset[str]]:
        """Tensors by how their gradient is summed."""
        experts = frozenset(name for name in self.want.gradients if has_spread(name, Spread.experts))
        held = self.got.holders
        whole = frozenset(
            name for name in self.want.gradients
            if name not in experts and name in held and "tp" in next(iter(held[name].values())).reduced_over
        )  # fmt: skip
        marked = whole or frozenset(n for n in self.want.gradients if has_spread(n, Spread.whole))
        return {
            "experts": experts,
            "norms and routers": marked,
            "all other weights": frozenset(self.want.gradients) - experts - marked,
        }

    @property
    def degrees(self) -> dict[str, int]:
        """Every degree above 1."""
        return {axis: getattr(self.layout, axis) for axis in _AXES if getattr(self.layout, axis) > 1}

    @property
    def loss_differs(self) -> bool:
        """At the first step already, so before any gradient was used."""
        return not is_near(self.got.losses[0], self.want.losses[0], 1e-5)

    @property
    def routed_share(self) -> float:
        """Tokens that the routers of the first step saw, against one process; 1.0 for a dense model."""
        got, want = (float(side.columns(None)[0].sum()) for side in (self.got, self.want))
        return got / want if want else 1.0

    def scale(self, name: str) -> float | None:
        """k where the gradient is k times what it should be and nothing else, else None."""
        got, want = (side.gradients.get(name, np.empty(0)).astype(np.float64).ravel() for side in (self.got, self.want))
        size = float(want @ want)
        if got.shape != want.shape or size == 0 or not np.isfinite(got).all():
            return None
        k = float(got @ want) / size
        return k if float(np.linalg.norm(got - k * want)) <= _REST * np.sqrt(size) else None

    def squared_norm(self, names: Iterable[str]) -> float:
        """Of the right gradients."""
        return sum(float(np.square(self.want.gradients[name].astype(np.float64)).sum()) for name in names)

    def axis_between(self, sides: tuple[tuple[int, ...], ...]) -> str:
        """The axes along which the first ranks of two sides differ."""
        first, second = (self.layout.coordinate(side[0]) for side in sides[:2])
        return " x ".join(axis for axis in ("tp", "cp", "dp", "pp") if first[axis] != second[axis])


def _forward_order(place: Place) -> tuple[int, int]:
    return place[0], PARTS.index(place[1])


def is_near(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) <= tolerance * abs(b)


def listed(names: set[str] | frozenset[str]) -> str:
    """The first two, and how many more there are."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - 2} more" if len(ordered) > 2 else ""
    return ", ".join(ordered[:2]) + rest
