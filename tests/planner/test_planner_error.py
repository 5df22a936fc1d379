"""The planner against published runs: the table in the docs is the code's, and within what is promised."""

import json
from pathlib import Path
from statistics import median

import pytest

from benchmarks.planner_error import (
    LEFT_OUT,
    comparable,
    errors,
    fit,
    fitted_rows,
    left_out,
    predict,
    rows,
    spearman,
    table,
)
from gpt4moe.planner.efficiency import PROFILES

DOCS = Path(__file__).resolve().parents[2] / "docs" / "planner-error.md"


def test_the_error_table_of_the_docs_is_what_the_code_prints() -> None:
    """`python -m benchmarks.planner_error` prints it; the page ends with it."""
    assert DOCS.read_text().strip().endswith(table().strip())


def test_every_row_has_its_own_name_and_a_source() -> None:
    names = [row.name for row in rows()]
    assert len(set(names)) == len(names) > 100
    assert all(row.profile in PROFILES for row in rows())


def test_the_median_row_left_out_of_the_fit_is_within_ten_percent() -> None:
    kept = json.loads(LEFT_OUT.read_text())
    fitted = {row.name for row in rows() if row.source != "modelzoo"}
    assert set(kept) == fitted
    assert median(abs(error) for error in kept.values()) < 0.10


def test_the_stored_left_out_errors_are_the_ones_the_fit_gives() -> None:
    """The smallest stack again; the others take minutes."""
    kept = json.loads(LEFT_OUT.read_text())
    for name, error in left_out("llama3-2024").items():
        assert error == pytest.approx(kept[name], abs=1e-3)


def test_the_constants_in_the_code_are_where_the_fit_ends() -> None:
    """The dense stacks: a fit that starts at the rounded constants hardly moves."""
    for stack in ("megatron-lm-2022", "llama3-2024"):
        mine = fitted_rows(stack)
        again = fit(stack, mine, step=1.05)
        better = median(abs(e) for e in errors(mine, again)) - median(abs(e) for e in errors(mine, PROFILES))
        assert abs(better) < 0.005


def test_layouts_of_one_model_are_ranked_as_measured() -> None:
    ranked = [
        spearman([row.seconds for row in group], [predict(row, PROFILES[row.profile]) for row in group])
        for group in comparable().values()
    ]
    assert len(ranked) > 10
    assert sum(ranked) / len(ranked) >= 0.8


def test_rank_correlation_is_spearmans() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert spearman([1, 2, 3], [1, 3, 2]) == 0.5
