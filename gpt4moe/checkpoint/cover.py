"""Whether rectangles cover a tensor exactly once, with nothing missing and nothing twice. No torch."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import prod

from gpt4moe.parallel.shard import WEIGHT

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, shape)"""


def cover_problem(global_shape: tuple[int, ...], rectangles: list[Rectangle]) -> str | None:
    """What is wrong with the cover, or None.

    Volumes alone would miss a piece written twice while another is missing, so overlap is checked too.
    """
    for offset, shape in rectangles:
        if any(o < 0 or o + n > g for o, n, g in zip(offset, shape, global_shape, strict=True)):
            return f"the piece at {offset} of {shape} reaches outside {global_shape}"
    for cluster in _clusters(rectangles, len(global_shape)):
        for (offset, shape), (other_offset, other_shape) in combinations(cluster, 2):
            if all(
                max(a, b) < min(a + n, b + m)
                for a, n, b, m in zip(offset, shape, other_offset, other_shape, strict=True)
            ):
                return f"the pieces at {offset} and {other_offset} overlap"
    volume, whole = sum(prod(shape) for _, shape in rectangles), prod(global_shape)
    return None if volume == whole else f"{whole - volume} of {whole} elements are missing"


def _clusters(rectangles: list[Rectangle], num_dims: int) -> Iterator[list[Rectangle]]:
    """Groups of rectangles that may overlap one another; rectangles of two groups cannot.

    Splits along one axis after the other wherever no interval reaches across, until no axis splits. A tensor cut over
    thousands of ranks ends in groups of few rectangles, so that comparing pairs stays cheap.
    """
    waiting = [(rectangles, 0, 0)]
    while waiting:
        cluster, axis, unsplit = waiting.pop()
        if len(cluster) < 2:
            continue
        if unsplit == num_dims:
            yield cluster
            continue
        parts = _split(cluster, axis)
        unsplit = unsplit + 1 if len(parts) == 1 else 1
        waiting += [(part, (axis + 1) % num_dims, unsplit) for part in parts]


def _split(rectangles: list[Rectangle], axis: int) -> list[list[Rectangle]]:
    """Groups of rectangles whose intervals along the axis do not overlap with another group's."""
    parts: list[list[Rectangle]] = []
    end = -1
    for rectangle in sorted(rectangles, key=lambda rectangle: rectangle[0][axis]):
        start = rectangle[0][axis]
        if start >= end:
            parts.append([])
        parts[-1].append(rectangle)
        end = max(end, start + rectangle[1][axis])
    return parts


def tensor_problems(
    shapes: Mapping[str, tuple[int, ...]],
    rectangles: Mapping[str, list[Rectangle]],
    wanted: list[str],
    states: Sequence[str],
) -> Iterator[str]:
    """What is wrong with a checkpoint's tensors as a set; each is named KIND/PARAMETER.

    Finds tensors that are not covered exactly once, tensors of `wanted` that are missing, tensors that are not of the
    model, and weights that have some of the optimizer's states but not all.

    Args:
        wanted: every weight and buffer that must be there, and no other may; empty: not checked.
        states: the kinds of the optimizer's state tensors: a weight has all of them or, frozen or converted, none.
    """
    kinds = (WEIGHT, *states)
    unmoved = {name for name in shapes if name.partition("/")[0] not in states}
    for name in sorted(unmoved.symmetric_difference(wanted) if wanted else ()):
        yield f"{name}: " + ("the whole tensor is missing" if name in wanted else "not a tensor of the model")
    for name, shape in shapes.items():
        wrong = cover_problem(shape, rectangles[name])
        if wrong:
            yield f"{name}: {wrong}"
    parameters = {
        kind: {name.removeprefix(f"{kind}/") for name in shapes if name.startswith(f"{kind}/")} for kind in kinds
    }
    with_states = set().union(*(parameters[kind] for kind in states))
    for kind in kinds:
        for parameter in sorted(with_states - parameters[kind]):
            if f"{kind}/{parameter}" in wanted:
                continue  # reported above
            yield f"{kind}/{parameter}: the whole tensor is missing"
