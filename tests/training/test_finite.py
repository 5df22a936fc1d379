"""Before a save: any number that is not finite is found, and finite ones are left alone, whatever their sum is."""

from math import inf, nan

import pytest
import torch

from gpt4moe.checkpoint.storage import Piece
from gpt4moe.training.finite import nonfinite_tensors


def _piece(name: str, values: torch.Tensor) -> Piece:
    return Piece(name, tuple(values.shape), (0,), tuple(values.shape), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [[nan], [inf], [-inf], [inf, -inf], [nan, inf]])
def test_a_number_that_is_not_finite_is_found_wherever_it_is(bad: list[float], dtype: torch.dtype) -> None:
    for place in (0, 17, 96):
        values = torch.ones(98, dtype=dtype)
        values[place : place + len(bad)] = torch.tensor(bad, dtype=dtype)
        pieces = [_piece("weight/a", torch.ones(5)), _piece("weight/b", values), _piece("weight/c", torch.ones(0))]
        assert nonfinite_tensors(pieces) == ["weight/b"]


def test_finite_numbers_pass_though_their_sum_is_infinite() -> None:
    largest = torch.finfo(torch.float32).max
    assert nonfinite_tensors([_piece("exp_avg_sq/a", torch.full((9,), largest)), _piece("x", torch.arange(3))]) == []
