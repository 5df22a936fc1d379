"""Triton's kernel of weight_gradients.add_grouped_product. Triton is imported here, so only where it is chosen.

A program has one tile of one expert's matrix. It sums over the expert's rows in fp32, in their order, and is the only
one that writes its tile: equal runs are equal. A tile of an expert without rows is neither read nor written.

    grad [n, out], x [n, in] of an expert --sums, DEPTH rows at a time--> [ROWS, COLUMNS] --> added to into [out, in]
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """Of the matrix, rows that are read at once, and how many such reads are under way."""

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int


TILES = {9: Tile(128, 256, 64, stages=3, warps=8)}
"""By major compute capability. Hopper's has 147 KB in shared memory; not tuned, no GPU was at hand."""
SMALL = Tile(128, 128, 64, stages=3, warps=8)
"""98 KB, which an L40S has too."""
BAND = 8
"""Rows of tiles whose programs run one after the other, so that what they read is in the L2 cache."""


@triton.jit
def _add(  # type: ignore[no-untyped-def]
    into, grad, x, ends, height, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    last = tl.load(ends + expert)
    if last > first:
        across = tl.cdiv(width, COLUMNS)
        place = tl.program_id(0)
        top = place // (BAND * across) * BAND
        tall = tl.minimum(tl.cdiv(height, ROWS) - top, BAND)
        row = (top + place % (BAND * across) % tall) * ROWS + tl.arange(0, ROWS)
        column = place % (BAND * across) // tall * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(first, last, DEPTH):
            token = (start + tl.arange(0, DEPTH)).to(tl.int64)[:, None]  # N x out elements may be more than 2^31
            is_ours = token < last
            given = tl.load(grad + token * height + row[None, :], mask=is_ours & (row < height)[None, :], other=0.0)
            seen = tl.load(x + token * width + column[None, :], mask=is_ours & (column < width)[None, :], other=0.0)
            total = tl.dot(tl.trans(given), seen, total, input_precision="ieee")
        at = into + (expert.to(tl.int64) * height + row[:, None]) * width + column[None, :]
        inside = (row < height)[:, None] & (column < width)[None, :]
        tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)


def add(into: Tensor, grad: Tensor, x: Tensor, ends: Tensor, tile: Tile | None = None) -> None:
    """into [L, out, in] fp32 += of each expert, grad [n, out].T @ x [n, in]; all contiguous.

    Args:
        ends: [L] int32, where the rows of each expert end.
        tile: None: that of the device.
    """
    experts, height, width = into.shape
    if not (into.numel() and grad.numel()):
        return
    if tile is None:
        tile = TILES.get(torch.cuda.get_device_capability(into.device)[0], SMALL)
    tiles = triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.columns)
    _add[(tiles, experts)](
        into, grad, x, ends, height, width,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, BAND=BAND,
        num_stages=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
