"""The sum of squares behind the gradient norm: as exact as in fp64, in a small part of its memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpt4moe.training.engine import NORM_ROW, squared_norm

CPU = torch.device("cpu")
NUM = 1_000_003


class _LargestResult(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes, views apart."""

    def __init__(self, inputs: list[Tensor]):
        super().__init__()
        self.known = {value.untyped_storage().data_ptr() for value in inputs}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in self.known:
            self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return made


def _gradients(kind: str) -> Tensor:
    drawn = torch.randn(NUM, generator=torch.Generator().manual_seed(0))
    return {"normal": drawn * 1e-4, "equal": torch.full((NUM,), 0.1234567), "a few large": drawn**5}[kind]


@pytest.mark.parametrize("kind", ["normal", "equal", "a few large"])
def test_the_sum_is_that_of_fp64_however_the_elements_are_divided_over_ranks(kind: str) -> None:
    whole = _gradients(kind)
    wanted = float(torch.linalg.vector_norm(whole, dtype=torch.float64))
    for sizes in ([NUM], [1, 7, NORM_ROW, 0, 3 * NORM_ROW - 1, NUM - 4 * NORM_ROW - 7], [NUM // 2, NUM - NUM // 2]):
        got = float(squared_norm(whole.split(sizes), CPU).sqrt())
        assert got == pytest.approx(wanted, rel=5e-7)  # half of what a layout may change the norm (test_gradients.py)


def test_no_copy_of_the_gradients_is_made() -> None:
    """torch.linalg.vector_norm(dtype=float64) makes one that is twice as large."""
    values = list(_gradients("normal").split(NUM // 3))
    with _LargestResult(values) as seen:
        squared_norm(values, CPU)
    assert 0 < seen.bytes < 4 * NUM / 100


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_shows(bad: float) -> None:
    values = _gradients("normal")
    values[NUM // 2] = bad
    assert not squared_norm([values], CPU).isfinite()


def test_a_rank_without_counted_gradients_adds_nothing() -> None:
    total = squared_norm([], CPU)
    assert (float(total), total.dtype, total.dim()) == (0.0, torch.float64, 0)
