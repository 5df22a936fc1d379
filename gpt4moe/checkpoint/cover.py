"""Whether rectangles cover a tensor exactly once: nothing missing, nothing twice."""

from math import prod

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
