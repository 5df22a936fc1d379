"""Errors are the same in the process that asked a pool for work."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from gpt4moe.errors import CorruptionError, DamagedCheckpoint, DataError, Gpt4MoeError, RankEnded, together


def _raise(error: Gpt4MoeError) -> None:
    raise error


@pytest.mark.parametrize(
    "error",
    [
        DamagedCheckpoint(Path("runs/a"), "Block 0 is damaged."),
        CorruptionError("A bit.", "Mend.", 7),
        RankEnded("Rank 3.", 86),
        together([DataError("A.", "B."), DataError("C.", "D.")]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_comes_out_of_a_pool_whole(error: Gpt4MoeError) -> None:
    error.exit_code, error.have_met = 5, True
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        told = pool.submit(_raise, error).exception()
    assert type(told) is type(error) and str(told) == str(error)
    own = {name: value for name, value in vars(error).items() if name != "parts"}
    assert {name: vars(told)[name] for name in own} == own
    assert isinstance(told, Gpt4MoeError) and [str(part) for part in told.parts] == [str(it) for it in error.parts]
