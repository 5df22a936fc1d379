"""Whether rectangles cover a tensor exactly once: nothing missing, nothing twice. No torch."""

from collections.abc import Iterator, Mapping
from math import prod

from gpt4moe.checkpoint.storage import KINDS, MOMENTS

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, shape)"""


def cover_problem(global_shape: tuple[int, ...], rectangles: list[Rectangle]) -> str | None:
    """What is wrong with the cover, or None.

    Volumes alone would miss a piece written twice while another is missing, so overlap is checked too: rectangles
    sorted by their start along axis 0 can only overlap while both are open (a sweep).
    """
    for offset, shape in rectangles:
        if any(o < 0 or o + n > g for o, n, g in zip(offset, shape, global_shape, strict=True)):
            return f"the piece at {offset} of {shape} reaches outside {global_shape}"
    open_now: list[Rectangle] = []
    for offset, shape in sorted(rectangles):
        open_now = [other for other in open_now if other[0][0] + other[1][0] > offset[0]]
        for other_offset, other_shape in open_now:
            if all(
                max(a, b) < min(a + n, b + m)
                for a, n, b, m in zip(offset, shape, other_offset, other_shape, strict=True)
            ):
                return f"the pieces at {other_offset} and {offset} overlap"
        open_now.append((offset, shape))
    volume, whole = sum(prod(shape) for _, shape in rectangles), prod(global_shape)
    return None if volume == whole else f"{whole - volume} of {whole} elements are missing"


def tensor_problems(shapes: Mapping[str, tuple[int, ...]], rectangles: Mapping[str, list[Rectangle]]) -> Iterator[str]:
    """What is wrong with a checkpoint's tensors as a set; each is named KIND/PARAMETER.

    Beside every cover: a moment without its weight, or one of Adam's two moments without the other.
    """
    for name, shape in shapes.items():
        wrong = cover_problem(shape, rectangles[name])
        if wrong:
            yield f"{name}: {wrong}"
    parameters = {
        kind: {name.removeprefix(f"{kind}/") for name in shapes if name.startswith(f"{kind}/")} for kind in KINDS
    }
    with_moments = set().union(*(parameters[kind] for kind in MOMENTS))
    for kind in KINDS:
        for parameter in sorted(with_moments - parameters[kind]):
            yield f"{kind}/{parameter}: the whole tensor is missing"
