"""How many rows each expert has: counted on the device, and known to the host only where it asks.

    counts on the GPU --HostCopy, queued at once--> pinned memory ... more work is queued ... --listed--> a list

The host then waits for the kernels before the copy alone. What was queued behind it keeps the GPU at work meanwhile.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

ALIGNED = 8
"""Rows: 16 bytes of bf16, by which torch's grouped product wants every expert to begin."""


class HostCopy:
    """Integers of the device on their way to the host."""

    def __init__(self, values: Tensor):
        self.values = values
        self.copied: Any = None
        if values.device.type == "cuda":
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    @cached_property
    def listed(self) -> Any:
        """Nested lists. Waits for the copy, the first time."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.values.tolist()


class ExpertRows:
    """The rows of the local experts, which are sorted by expert.

    Args:
        counts: [L] int, rows of each expert; or a function that makes it, called where a kernel wants it.
        on_host: makes the same as a list; None: by a copy of `counts`, for which the host waits.
        is_aligned: whether a grouped kernel can take the rows as they stand.
    """

    def __init__(
        self, counts: Tensor | Callable[[], Tensor], on_host: Callable[[], list[int]] | None = None,
        is_aligned: bool = True,
    ):  # fmt: skip
        self._counts, self._on_host, self.is_aligned = counts, on_host, is_aligned

    @cached_property
    def counts(self) -> Tensor:
        return self._counts if isinstance(self._counts, Tensor) else self._counts()

    @cached_property
    def ends(self) -> Tensor:
        """[L] int32, where the rows of each expert end."""
        return torch.cumsum(self.counts, 0, dtype=torch.int32)

    @cached_property
    def listed(self) -> list[int]:
        """The counts on the host, which waits for them."""
        return self.counts.tolist() if self._on_host is None else self._on_host()


def aligned_size(count: int) -> int:
    """Places of an expert with so many rows at a grouped kernel: a multiple of ALIGNED, and no fewer."""
    return max(count, 1) + ALIGNED - 1 & -ALIGNED
