"""What of the descent phase differs from one process, in the terms that suspects are found by. numpy, no torch."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gpt4moe.architecture.rows import Spread
from gpt4moe.architecture.tensors import has_spread
from gpt4moe.parallel.layout import Layout
from gpt4moe.proof.compare import TensorDifference
from gpt4moe.proof.outcome import GRADIENT, Outcome

_AXES = ("tp", "cp", "dp", "ep", "etp", "expert_dp", "pp", "vpp")
# A gradient is k times another when what remains is this small a share of it.
_REST = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class DescentEvidence:
    """The descent phase on the layout (got) and in one process (want)."""

    layout: Layout
    micro_batches: int
    """Of a rank."""
    got: Outcome
    want: Outcome
    different: frozenset[str]
    """Tensors whose gradient of the first step differs."""

    @classmethod
    def of(
        cls, layout: Layout, micro_batches: int, got: Outcome, want: Outcome, tensors: Iterable[TensorDifference]
    ) -> "DescentEvidence":
        different = frozenset(item.name for item in tensors if item.kind == GRADIENT and item.is_different)
        return cls(layout=layout, micro_batches=micro_batches, got=got, want=want, different=different)

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


def is_near(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) <= tolerance * abs(b)
