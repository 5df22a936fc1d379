"""Picks the ranks of a proof: the mesh that was asked for, or smaller ones that cover it together. No torch.

    tp 2 x pp 2 x cp 2 x dp 2, ep 4    ->   cp 2 x pp 2 x dp 2, ep 2;   tp 2 x pp 2 x dp 2, ep 2;
                                            tp 2 x cp 2 x dp 2, ep 2

Every degree becomes one of its divisors. Every axis is in some mesh, and every two axes are in one mesh together, where
LARGEST_WORLD ranks allow it. Combinations that no small mesh covers are listed as not proved (`lost`).
"""

import dataclasses
from collections.abc import Iterator
from itertools import combinations, product

from gpt4moe.config.model import divisors
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import LayoutError
from gpt4moe.parallel.layout import Layout, fewest_ranks
from gpt4moe.parallel.legality import require_legal

LARGEST_WORLD = 12
"""The most ranks of a mesh. Two cores run so many in a minute or two; tp 2, pp 3 and dp 2 just fit."""
MOST_MESHES = 4
_TRIED_WORLDS = 64
_AXES = ("tp", "cp", "pp", "dp", "ep", "etp")


def asked_layout(run: RunConfig, ranks: int | None) -> Layout:
    """The layout to prove, legal for the trainer.

    Args:
        ranks: the world size; None: the smallest legal one, with two data-parallel ranks and with copies of experts
            where they fit.
    Raises: LayoutError, the trainer's own, when no world (or not this one) can run it.
    """
    parallel = run.parallel
    if ranks is not None:
        require_legal(run.model, parallel, run.training, ranks)
        return Layout.from_config(parallel, ranks)
    smallest = fewest_ranks(parallel)
    legal = [times * smallest for times in range(1, _TRIED_WORLDS + 1) if _is_legal(run, times * smallest)]
    if not legal:
        require_legal(run.model, parallel, run.training, smallest)
    fits_whole = legal[0] <= LARGEST_WORLD  # then no larger world is asked for
    layouts = [Layout.from_config(parallel, world) for world in legal if world <= LARGEST_WORLD or not fits_whole]
    return max(layouts, key=lambda layout: (layout.dp > 1, layout.dp > 1 and _has_copies(layout), -layout.world_size))


def _is_legal(run: RunConfig, world_size: int) -> bool:
    try:
        require_legal(run.model, run.parallel, run.training, world_size)
    except LayoutError:
        return False
    return True


def reduced(asked: Layout) -> list[Layout]:
    """`asked` itself when it has at most LARGEST_WORLD ranks; else at most MOST_MESHES smaller layouts.

    The first covers most of what `asked` has (_kinds). Each further one covers most of what is still missing.
    """
    if asked.world_size <= LARGEST_WORLD:
        return [asked]
    smaller = list(_smaller(asked))
    missing, chosen = _kinds(asked), list[Layout]()
    while missing and len(chosen) < MOST_MESHES:
        best = max(smaller, key=lambda layout: (len(missing & _kinds(layout)), _likeness(layout, asked)))
        if not missing & _kinds(best):
            break
        chosen.append(best)
        missing -= _kinds(best)
    return chosen


def copies_beside(asked: Layout) -> list[Layout]:
    """A mesh of one stage where every expert has two copies, to prove beside `asked`, which has no copies; at most
    one. It keeps the axes that the experts of `asked` are spread over."""
    doubled = dataclasses.replace(asked, dp=2 * asked.dp)
    alike = [axis for axis in ("tp", "cp", "ep", "etp") if getattr(asked, axis) > 1]
    fits = [layout for layout in _smaller(doubled)
            if layout.pp == 1 and _has_copies(layout) and all(getattr(layout, axis) > 1 for axis in alike)]  # fmt: skip
    return sorted(fits, key=lambda layout: layout.world_size)[:1]


def _smaller(asked: Layout) -> Iterator[Layout]:
    choices = {axis: _degrees(getattr(asked, axis)) for axis in _AXES}
    for sizes in product(*choices.values()):
        axes = dict(zip(_AXES, sizes, strict=True))
        stage = axes["tp"] * axes["cp"] * axes["dp"]
        if stage * axes["pp"] <= LARGEST_WORLD and stage % (axes["ep"] * axes["etp"]) == 0:
            yield dataclasses.replace(
                asked, **axes, vpp=_degrees(asked.vpp)[1] if min(asked.vpp, axes["pp"]) > 1 else 1,
                sequence_parallel=asked.sequence_parallel and axes["tp"] > 1,
            )  # fmt: skip


def _degrees(asked: int) -> list[int]:
    """1 and the divisors that leave room for another axis; 1 and 2 where there are none (11, 13, ...)."""
    fits = [degree for degree in divisors(asked) if degree <= LARGEST_WORLD // 2]
    return fits if asked == 1 or len(fits) > 1 else [1, 2]


def _likeness(layout: Layout, asked: Layout) -> tuple[int, ...]:
    alive = sum((getattr(layout, axis) > 1) == (getattr(asked, axis) > 1) for axis in _AXES)
    alike = sum(trait(layout) == trait(asked) for trait in _TRAITS.values())
    return alive, alike, -sum(getattr(layout, axis) for axis in _AXES)


def _spans_dp(layout: Layout) -> bool:
    return layout.ep * layout.etp > layout.tp * layout.cp


def _has_copies(layout: Layout) -> bool:
    return layout.expert_dp > 1


_TRAITS = {"experts spread beyond tp x cp": _spans_dp, "copies of experts": _has_copies}


def _alive(layout: Layout) -> list[str]:
    return [axis for axis in (*_AXES, "vpp") if getattr(layout, axis) > 1]


def _kinds(layout: Layout) -> set[str]:
    """What a smaller layout may lack: the axes above 1, every two of them together, the traits."""
    alive = _alive(layout)
    pairs = {f"{one} together with {other}" for one, other in combinations(alive, 2)}
    return {*alive, *pairs, *(name for name, trait in _TRAITS.items() if trait(layout))}


def lost(asked: Layout, proved: list[Layout]) -> list[str]:
    """What `asked` has and no proved layout has: axes, two axes together, traits. If nothing, all axes at once."""
    missing = sorted(_kinds(asked).difference(*map(_kinds, proved)))
    if not missing and not any(_alive(layout) == _alive(asked) for layout in proved):
        missing = [f"{', '.join(_alive(asked))} all at once: every two of them were together"]
    return missing


def reductions(asked: Layout, proved: Layout) -> list[str]:
    """`tp 8 -> 2`, for every degree that was reduced."""
    degrees = [(name, getattr(asked, name), getattr(proved, name)) for name in (*_AXES, "vpp")]
    return [
        f"{name} {before} -> {after}{' (no divisor fits)' if before % after else ''}"
        for name, before, after in degrees if before != after
    ]  # fmt: skip
