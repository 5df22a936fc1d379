"""Layout: the place of each rank in the grid, as arithmetic. No torch, no process group: the planner uses it too.

The grid of W = tp x cp x dp x pp ranks, tp fastest, pp slowest (Megatron's order "tp-cp-ep-dp-pp"):

    rank = tp_i + tp * (cp_i + cp * (dp_i + dp * pp_i))

For experts the same ranks of a stage form a second grid, etp fastest ("parallel folding", arXiv:2504.14960):

    rank = etp_i + etp * (ep_i + ep * expert_dp_i)  +  stage offset

so ep may span tp, cp and dp. A MoE layer's all-to-all runs over `ep`, its expert gradients over `expert_dp`.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate, product
from math import lcm
from operator import mul

from gpt4moe.config.parallel import ParallelConfig

DENSE_AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("etp", "ep", "expert_dp")
# Groups that are products of axes, by their names in ProcessGroups.
COMBINED_AXES = {"dp_cp": ("cp", "dp"), "tp_cp": ("tp", "cp"), "model": ("tp", "pp")}


def fewest_ranks(parallel: ParallelConfig) -> int:
    """The smallest number of ranks for these degrees. Every other possible number is a multiple of it."""
    return parallel.pp * lcm(parallel.tp * parallel.cp, parallel.ep * parallel.etp)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The parallel degrees of one run. `dp` and `expert_dp` follow from the world size."""

    tp: int
    cp: int
    dp: int
    pp: int
    vpp: int
    ep: int
    etp: int
    sequence_parallel: bool

    @classmethod
    def from_config(cls, parallel: ParallelConfig, world_size: int) -> "Layout":
        """The layout of `world_size` ranks. Call legality.require_legal first: this only asserts."""
        dp, rest = divmod(world_size, parallel.tp * parallel.cp * parallel.pp)
        assert rest == 0 and dp * parallel.tp * parallel.cp % (parallel.ep * parallel.etp) == 0
        return cls(
            tp=parallel.tp, cp=parallel.cp, dp=dp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep, etp=parallel.etp,
            sequence_parallel=parallel.sequence_parallel_on,
        )  # fmt: skip

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tp * self.cp * self.dp

    @property
    def expert_dp(self) -> int:
        """Copies of each expert."""
        return self.stage_size // (self.ep * self.etp)

    def coordinate(self, rank: int) -> dict[str, int]:
        """The index of `rank` along every axis, dense and expert."""
        stage, inside = divmod(rank, self.stage_size)
        return {
            "tp": inside % self.tp,
            "cp": inside // self.tp % self.cp,
            "dp": inside // (self.tp * self.cp),
            "pp": stage,
            "etp": inside % self.etp,
            "ep": inside // self.etp % self.ep,
            "expert_dp": inside // (self.etp * self.ep),
        }

    def members(self, group: str, rank: int) -> list[int]:
        """Ranks of the group `group` that `rank` belongs to, ascending.

        `group` is an axis (tp, cp, dp, pp, ep, etp, expert_dp) or a product (dp_cp, tp_cp, model).
        """
        varying = COMBINED_AXES.get(group, (group,))
        strides = self._strides(EXPERT_AXES if varying[0] in EXPERT_AXES else DENSE_AXES)
        mine = self.coordinate(rank)
        first = rank - sum(mine[axis] * strides[axis] for axis in varying)
        steps = [range(0, getattr(self, axis) * strides[axis], strides[axis]) for axis in varying]
        return sorted(first + sum(step) for step in product(*steps))

    def _strides(self, grid: tuple[str, ...]) -> dict[str, int]:
        """The difference of rank between neighbours along each axis of a grid."""
        return dict(zip(grid, accumulate((getattr(self, axis) for axis in grid[:-1]), mul, initial=1), strict=True))

    def describe(self) -> str:
        """One line for people: `8 ranks = tp 2 x pp 2 x dp 2, ep 4, sequence parallel`."""
        sizes = {"tp": self.tp, "cp": self.cp, "pp": self.pp, "dp": self.dp}
        grid = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one rank"
        extras = [
            f"{name} {size}" for name, size in (("vpp", self.vpp), ("ep", self.ep), ("etp", self.etp)) if size > 1
        ]
        extras += ["sequence parallel"] if self.sequence_parallel else []
        return ", ".join([f"{self.world_size} rank{'s' * (self.world_size > 1)} = {grid}", *extras])


def ranks_text(ranks: Collection[int]) -> str:
    """Ranks, with runs of them joined: "rank 3", "ranks 0, 2-5"."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    texts = [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts]
    more = f" and {len(texts) - _NAMED_RUNS} more runs of ranks" if len(texts) > _NAMED_RUNS else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(texts[:_NAMED_RUNS])}{more}"


_NAMED_RUNS = 8
