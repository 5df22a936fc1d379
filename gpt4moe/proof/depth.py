"""Fewer layers of the same pattern: uneven and empty stages stay so, dense and MoE layers stay where they were.

stages of 8, 8, 7, 7 layers                       ->  2, 2, 1, 1
3 dense layers, then MoE, on one stage (58 + 3)   ->  dense, MoE
"""

from dataclasses import dataclass

from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.placement import stage_layers

_DEEPEST_STAGE = 3


@dataclass(frozen=True, slots=True)
class Depth:
    """Layers of the shrunken model."""

    num_layers: int
    layer_pattern: list[int] | None
    layers_per_stage: list[int] | None


def shrunk_depth(run: RunConfig, num_stages: int) -> Depth:
    """The depth of `run` for `num_stages` (pp x vpp of the mesh to prove): a layer a stage where all are alike."""
    is_moe = run.model.moe_layers
    kinds = [[int(is_moe[layer]) for layer in stage] for stage in stage_layers(run.model.num_layers, run.parallel)]
    kinds = [kinds[at] for at in _spread(len(kinds), num_stages)]
    sizes = sorted({len(stage) for stage in kinds if stage})
    wanted = [min(1 + sizes.index(len(stage)), _DEEPEST_STAGE) if stage else 0 for stage in kinds]
    wanted = [max(size, len(set(stage))) for size, stage in zip(wanted, kinds, strict=True)]
    if num_stages == 1:
        wanted = [max(2, wanted[0])]
    if len(sizes) == 1 and all(kinds):  # even stages stay even
        wanted = [max(wanted)] * num_stages
    stages = [_fewer(stage, size) for stage, size in zip(kinds, wanted, strict=True)]
    pattern = [kind for stage in stages for kind in stage]
    lengths = [len(stage) for stage in stages]
    return Depth(
        num_layers=len(pattern),
        layer_pattern=None if run.model.moe is None or all(pattern) else pattern,
        layers_per_stage=None if len(set(lengths)) == 1 else lengths,
    )


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
