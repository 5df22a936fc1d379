"""The table of optimizers: a row for every kind, and an engine refuses what it cannot run."""

from dataclasses import replace
from enum import Enum
from typing import Any

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.config.optimizer import EngineKind, OptimizerKind
from gpt4moe.config.optimizer_table import OPTIMIZERS, optimizer_for
from gpt4moe.errors import ConfigError


class Other(str, Enum):
    """Kinds of this test alone."""

    lion = "lion"


LION: Any = Other.lion


def test_every_kind_has_a_row_that_some_engine_runs() -> None:
    assert set(OPTIMIZERS) == set(OptimizerKind)
    for kind, row in OPTIMIZERS.items():
        assert row.engines and row.states, kind
        assert all(optimizer_for(kind, engine) is row for engine in row.engines)


@pytest.mark.parametrize("engine", EngineKind)
def test_an_unknown_kind_is_refused_by_every_engine(engine: EngineKind) -> None:
    with pytest.raises(ConfigError) as caught:
        optimizer_for(LION, engine)
    assert f"optimizer.kind=lion with engine.kind={engine.value}, which runs adamw only" in caught.value.cause
    assert caught.value.cure == "Set optimizer.kind=adamw."


def test_a_kind_of_one_engine_is_refused_by_the_other_which_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(OPTIMIZERS[OptimizerKind.adamw], engines={EngineKind.deepspeed: "Lion"})
    monkeypatch.setitem(OPTIMIZERS, LION, row)
    assert optimizer_for(LION, EngineKind.deepspeed) is row
    with pytest.raises(ConfigError, match="which runs adamw only") as caught:
        optimizer_for(LION, EngineKind.megatron)
    assert caught.value.cure == "Set optimizer.kind=adamw, or engine=deepspeed."


def test_what_cannot_be_cut_into_flat_ranges_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both engines give a rank any range of a parameter's elements, and Muon needs whole matrices."""
    row = replace(OPTIMIZERS[OptimizerKind.adamw], is_elementwise=False)
    monkeypatch.setitem(OPTIMIZERS, LION, row)
    with pytest.raises(ConfigError, match=r"optimizer\.kind=lion"):
        optimizer_for(LION, EngineKind.deepspeed)


def test_a_run_is_checked_before_anything_is_built() -> None:
    run = load_run_config(["+experiment=tiny", "run.name=x"])
    run.optimizer.kind = LION
    with pytest.raises(ConfigError, match=r"optimizer\.kind=lion with engine\.kind=megatron"):
        run.validate()
