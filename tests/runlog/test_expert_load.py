"""A run of any length is a few windows that count each step once; their maps name what they show."""

import itertools
import json

import numpy as np
import pytest

from gpt4moe.pages.expert_maps import load_maps
from gpt4moe.runlog.expert_load import LoadHistory, max_windows


def tokens(step: int) -> np.ndarray:
    return np.array([[step, 1.0], [0.0, 2.0 * step]])


def history(last: int, start: LoadHistory | None = None, first: int = 1) -> LoadHistory:
    made = LoadHistory() if start is None else start
    for step in range(first, last + 1):
        made.add(step, tokens(step))
    return made


def check(made: LoadHistory, last: int) -> None:
    edges = [(window.first_step, window.last_step) for window in made.windows]
    assert edges[0][0] == 1 and edges[-1][1] == last
    assert all(before[1] + 1 == after[0] for before, after in itertools.pairwise(edges))
    for window in made.windows:
        wanted = sum(tokens(step) for step in range(window.first_step, window.last_step + 1))
        assert (window.tokens == wanted).all()


@pytest.mark.parametrize("last", [1, 23, 24, 25, 48, 49, 1000])
def test_windows_are_few_and_count_each_step_once(last: int) -> None:
    made = history(last)
    check(made, last)
    assert min(last, 12) <= len(made.windows) <= 24


def test_a_restart_goes_on_from_the_file_and_counts_redone_steps_once() -> None:
    made = LoadHistory.from_json(json.loads(json.dumps(history(20).to_json())))
    made.drop_after(15)
    check(history(60, made, first=16), 60)


def test_a_run_from_before_there_were_histories_begins_one() -> None:
    assert LoadHistory.from_json(None).windows == []


def test_large_models_have_fewer_windows() -> None:
    assert max_windows(120 * 16) == 24
    assert 4 <= max_windows(61 * 256) < 8
    assert all(max_windows(numbers) % 2 == 0 for numbers in range(1, 20_000, 7))


def test_maps_show_first_and_last_window_the_busiest_and_the_dead() -> None:
    page = load_maps(history(100).windows, [0, 1])
    assert page.count("<svg") == 8
    assert "steps 1 to " in page and " to 100" in page
    assert "busiest 2.00, 1 dead" in page


def test_one_window_is_no_history() -> None:
    assert load_maps(history(1).windows, [0, 1]) == ""


def test_gpt4s_maps_are_small() -> None:
    generator = np.random.default_rng(0)
    made = LoadHistory()
    for step in range(1, 31):
        made.add(step, generator.integers(0, 5000, (120, 16)).astype(float))
    assert len(load_maps(made.windows, list(range(120)))) < 300_000
    assert len(json.dumps(made.to_json())) < 500_000
