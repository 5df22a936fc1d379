"""The sum of squares behind the gradient norm: exact to fp64, without an fp64 copy of the gradients."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gpt4moe.training import engine
from gpt4moe.training.engine import sum_of_squares

NUM, PIECE = 1_000_003, 10_000


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "NORM_PIECE", PIECE)


def gradients(kind: str) -> Tensor:
    drawn = torch.randn(NUM, generator=torch.Generator().manual_seed(0))
    return {"normal": drawn * 1e-4, "equal": torch.full((NUM,), 0.1234567), "a few large": drawn**5}[kind]


@pytest.mark.parametrize("kind", ["normal", "equal", "a few large"])
def test_the_sum_is_that_of_fp64_however_the_elements_are_divided_over_ranks(kind: str) -> None:
    whole = gradients(kind)
    wanted = float(whole.double().square().sum())
    for sizes in ([NUM], [1, 7, PIECE, 0, 3 * PIECE - 1, NUM - 4 * PIECE - 7], [NUM // 2, NUM - NUM // 2]):
        assert float(sum_of_squares(whole.split(sizes))) == pytest.approx(wanted, rel=1e-12)


def test_no_more_than_a_piece_is_ever_copied_to_fp64() -> None:
    """A look at every allocation: the copy that torch.linalg.vector_norm makes is inside one operation."""
    values = list(gradients("normal").split(NUM // 3))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        sum_of_squares(values)
    largest = max(event.self_cpu_memory_usage for event in seen.events())
    assert 0 < largest <= 8 * PIECE


def test_a_piece_in_fp64_takes_128_megabytes_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 8 * engine.NORM_PIECE <= 128 * 2**20


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_shows(bad: float) -> None:
    values = gradients("normal")
    values[NUM // 2] = bad
    assert not sum_of_squares([values]).isfinite()


def test_a_rank_without_counted_gradients_adds_nothing() -> None:
    for nothing in ([], [torch.zeros(0)]):
        total = sum_of_squares(nothing)
        assert (float(total), total.dtype, total.dim()) == (0.0, torch.float64, 0)
