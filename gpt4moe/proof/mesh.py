"""Which ranks a proof runs on: the mesh that was asked for, or a smaller one of the same kind. No torch.

    tp 8 x pp 15 x dp 2 = 240 ranks, ep 16   ->   tp 2 x pp 2 x dp 2 = 8 ranks, ep 4

What is kept, in this order: as many axes as possible above 1; whether experts are spread beyond tp x cp, and whether
they have copies; then the most ranks.
"""

import dataclasses
from collections.abc import Iterator
from itertools import product
from math import prod

from gpt4moe.config.model import divisors
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import LayoutError
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import require_legal

LARGEST_WORLD = 8
"""Ranks of a proof: what two cores walk through in about two minutes."""
_TRIED_WORLDS = 64
_AXES = ("tp", "cp", "pp", "dp", "ep", "etp")


def asked_layout(run: RunConfig, ranks: int | None) -> Layout:
    """The layout to prove, legal for the trainer.

    Args:
        ranks: the world size; None: the smallest legal one, with two data-parallel ranks where they fit.
    Raises: LayoutError, the trainer's own, when no world (or not this one) can run it.
    """
    parallel = run.parallel
    if ranks is not None:
        require_legal(run.model, parallel, run.training, ranks)
        return Layout.from_config(parallel, ranks)
    unit = parallel.tp * parallel.pp * parallel.cp
    fits = [dp for dp in range(1, parallel.ep * parallel.etp + 1)
            if parallel.tp * parallel.cp * dp % (parallel.ep * parallel.etp) == 0]  # fmt: skip
    worlds = [unit * fits[0] * times for times in range(1, _TRIED_WORLDS + 1)]
    legal = [world for world in worlds if _is_legal(run, world)]
    if not legal:
        require_legal(run.model, parallel, run.training, worlds[0])
    fits_whole = legal[0] <= LARGEST_WORLD  # then it stays so
    with_copies = [world for world in legal if 2 * unit <= world and (world <= LARGEST_WORLD or not fits_whole)]
    return Layout.from_config(parallel, (with_copies or legal)[0])


def _is_legal(run: RunConfig, world_size: int) -> bool:
    try:
        require_legal(run.model, run.parallel, run.training, world_size)
    except LayoutError:
        return False
    return True


def reduced(asked: Layout) -> Layout:
    """`asked` itself up to LARGEST_WORLD ranks, else the layout of at most that many that keeps most of its kind."""
    if asked.world_size <= LARGEST_WORLD:
        return asked
    return max(_smaller(asked), key=lambda layout: _likeness(layout, asked))


def _smaller(asked: Layout) -> Iterator[Layout]:
    choices = {axis: [d for d in divisors(getattr(asked, axis)) if d <= LARGEST_WORLD] for axis in _AXES}
    if asked.pp > 1:
        choices["pp"] = sorted({*choices["pp"], 2})  # stages may be uneven: any number of them is of the same kind
    vpp = next((d for d in divisors(asked.vpp) if d > 1), 1)
    for sizes in product(*choices.values()):
        axes = dict(zip(_AXES, sizes, strict=True))
        stage = axes["tp"] * axes["cp"] * axes["dp"]
        if stage * axes["pp"] <= LARGEST_WORLD and stage % (axes["ep"] * axes["etp"]) == 0:
            yield dataclasses.replace(
                asked, **axes, vpp=vpp if axes["pp"] > 1 else 1,
                sequence_parallel=asked.sequence_parallel and axes["tp"] > 1,
            )  # fmt: skip


def _likeness(layout: Layout, asked: Layout) -> tuple[int, ...]:
    kept = sum((getattr(layout, axis) > 1) == (getattr(asked, axis) > 1) for axis in _AXES)
    alike = sum(trait(layout) == trait(asked) for trait in _TRAITS.values())
    return kept, alike, layout.world_size, -sum(getattr(layout, axis) for axis in _AXES)


def _spans_dp(layout: Layout) -> bool:
    return layout.ep * layout.etp > layout.tp * layout.cp


def _has_copies(layout: Layout) -> bool:
    return layout.expert_dp > 1


_TRAITS = {"experts spread beyond tp x cp": _spans_dp, "copies of experts": _has_copies}


def lost_traits(asked: Layout, proved: Layout) -> list[str]:
    """What `asked` has and `proved` had no ranks for."""
    return [name for name, trait in _TRAITS.items() if trait(asked) and not trait(proved)]


def reductions(asked: Layout, proved: Layout) -> list[str]:
    """`tp 8 -> 2`, for every degree that was reduced."""
    names = (*_AXES, "vpp")
    changed = [name for name in names if getattr(asked, name) != getattr(proved, name)]
    assert prod(getattr(proved, name) for name in ("tp", "cp", "pp", "dp")) == proved.world_size
    return [f"{name} {getattr(asked, name)} -> {getattr(proved, name)}" for name in changed]
