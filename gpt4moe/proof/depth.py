"""Fewer layers of the same pattern: uneven and empty stages stay so, dense and MoE layers stay where they were, and a
stage that is recomputed in part stays so.

stages of 8, 8, 7, 7 layers                       ->  2, 2, 1, 1
3 dense layers, then MoE, on one stage (58 + 3)   ->  dense, MoE
8 layers, the first 6 of which are recomputed     ->  2, the first of which is recomputed
"""

from dataclasses import dataclass
from itertools import chain

from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.placement import stage_layers

_DEEPEST_STAGE = 3


@dataclass(frozen=True, slots=True)
class Depth:
    """Layers of the shrunken model."""

    num_layers: int
    layer_pattern: list[int] | None
    layers_per_stage: list[int] | None
    recompute_layers: int | None


def shrunk_depth(run: RunConfig, num_stages: int) -> Depth:
    """The depth of `run` for `num_stages` (pp x vpp of the mesh to prove): a layer a stage where all are alike, one
    more where a part of them is recomputed."""
    is_moe = run.model.moe_layers
    kinds = [[int(is_moe[layer]) for layer in stage] for stage in stage_layers(run.model.num_layers, run.parallel)]
    cut = run.parallel.recompute_layers if recomputes_in_part(run) else None
    heads, tails = [stage[:cut] for stage in kinds], [stage[len(stage[:cut]) :] for stage in kinds]
    if num_stages == 1:
        heads, tails = [list(chain(*heads))], [list(chain(*tails))]
    at = _spread(len(heads), num_stages)
    heads, tails = [heads[stage] for stage in at], [tails[stage] for stage in at]
    recompute_layers = None if cut is None else max(len(set(head)) for head in heads)
    stages = _shallow(heads) if recompute_layers is None else _in_two_parts(heads, tails, recompute_layers)
    pattern = [kind for stage in stages for kind in stage]
    lengths = [len(stage) for stage in stages]
    return Depth(
        num_layers=len(pattern),
        layer_pattern=None if run.model.moe is None or all(pattern) else pattern,
        layers_per_stage=None if len(set(lengths)) == 1 else lengths,
        recompute_layers=recompute_layers,
    )


def recomputes_in_part(run: RunConfig) -> bool:
    """Whether a stage has layers that are recomputed and layers that are kept."""
    cut = run.parallel.recompute_layers
    return cut is not None and any(len(stage) > cut for stage in stage_layers(run.model.num_layers, run.parallel))


def _shallow(kinds: list[list[int]]) -> list[list[int]]:
    sizes = sorted({len(stage) for stage in kinds if stage})
    wanted = [min(1 + sizes.index(len(stage)), _DEEPEST_STAGE) if stage else 0 for stage in kinds]
    wanted = [max(size, len(set(stage))) for size, stage in zip(wanted, kinds, strict=True)]
    if len(kinds) == 1:
        wanted = [max(2, wanted[0])]
    if len(sizes) == 1 and all(kinds):  # even stages stay even
        wanted = [max(wanted)] * len(kinds)
    return [_fewer(stage, size) for stage, size in zip(kinds, wanted, strict=True)]


def _in_two_parts(heads: list[list[int]], tails: list[list[int]], size: int) -> list[list[int]]:
    """`size` recomputed layers on every stage that keeps others, then these; as many at most where none is kept."""
    return [
        _fewer(head, size if kept else len(set(head))) + kept for head, kept in zip(heads, _shallow(tails), strict=True)
    ]


def _spread(count: int, num: int) -> list[int]:
    """`num` indices of `count`, first and last among them, as evenly as it goes."""
    if num == 1:
        return [0]
    return [round(at * (count - 1) / (num - 1)) for at in range(num)]


def _fewer(kinds: list[int], size: int) -> list[int]:
    """`size` layers of a stage; of both kinds where it has both."""
    if not kinds or size == 0:
        return []
    chosen = [kinds[at] for at in _spread(len(kinds), size)]
    missing = set(kinds) - set(chosen)
    if missing:
        chosen[-1] = missing.pop()
    return chosen
