"""The table of optimizers: a row for every kind, and an engine refuses what it cannot run."""

from dataclasses import replace
from enum import Enum
from typing import Any

import pytest
import torch

from gpt4moe.config.load import load_run_config
from gpt4moe.config.optimizer import EngineKind, OptimizerConfig, OptimizerKind
from gpt4moe.config.optimizer_table import OPTIMIZERS, Optimizer, optimizer_for
from gpt4moe.errors import ConfigError
from gpt4moe.model.gpt import build_model
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.training.build import ENGINES
from gpt4moe.training.engine import check_states
from tests.distributed.case import BASE
from tests.spawn import run_ranks


class Other(str, Enum):
    """Kinds of this test alone."""

    lion = "lion"


LION: Any = Other.lion


def _kinds_of(engine: EngineKind) -> list[str]:
    return [kind.value for kind, row in OPTIMIZERS.items() if engine in row.engines and row.is_elementwise]


def test_every_kind_has_a_row_that_some_engine_runs() -> None:
    assert set(OPTIMIZERS) == set(OptimizerKind)
    for kind, row in OPTIMIZERS.items():
        assert row.engines and row.states, kind
        assert all(optimizer_for(kind, engine) is row for engine in row.engines)


@pytest.mark.parametrize("engine", EngineKind)
def test_an_unknown_kind_is_refused_by_every_engine(engine: EngineKind) -> None:
    with pytest.raises(ConfigError) as caught:
        optimizer_for(LION, engine)
    assert (
        f"optimizer.kind=lion with engine.kind={engine.value}, which runs {', '.join(_kinds_of(engine))} only"
        in caught.value.cause
    )
    assert caught.value.cure == f"Set optimizer.kind={_kinds_of(engine)[0]}."


def test_a_kind_of_one_engine_is_refused_by_the_other_which_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(OPTIMIZERS[OptimizerKind.adamw], engines={EngineKind.deepspeed: "Lion"})
    monkeypatch.setitem(OPTIMIZERS, LION, row)
    assert optimizer_for(LION, EngineKind.deepspeed) is row
    kinds = _kinds_of(EngineKind.megatron)
    with pytest.raises(ConfigError, match=f"which runs {', '.join(kinds)} only") as caught:
        optimizer_for(LION, EngineKind.megatron)
    assert caught.value.cure == f"Set optimizer.kind={kinds[0]}, or engine=deepspeed."


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


ADAM = OPTIMIZERS[OptimizerKind.adamw]


@pytest.mark.parametrize(
    ("class_name", "row"),
    [
        ("AdamW", replace(ADAM, states=ADAM.states[:1])),
        ("AdamW", replace(ADAM, states=(*ADAM.states, "max_exp_avg_sq"))),
        ("AdamW", replace(ADAM, step_name=None)),
        ("RAdam", replace(ADAM, states=(*ADAM.states, "step"), step_name=None)),
        ("NAdam", ADAM),
        ("NAdam", replace(ADAM, states=(*ADAM.states, "mu_product"))),
        ("NAdam", replace(ADAM, step_name="mu_product")),
    ],
)
def test_a_class_that_keeps_other_states_than_its_row_names_is_refused(class_name: str, row: Optimizer) -> None:
    made = getattr(torch.optim, class_name)
    with pytest.raises(ConfigError, match=rf"optimizer\.kind=lion: {class_name} keeps exp_avg, exp_avg_sq, ") as caught:
        check_states(LION, row, made)
    assert "config/optimizer_table.py" in caught.value.cause and "choose another optimizer.kind" in caught.value.cure


def test_rows_that_name_all_that_the_class_keeps_are_accepted() -> None:
    for class_name in ("AdamW", "RAdam"):
        check_states(LION, ADAM, getattr(torch.optim, class_name))
    check_states(LION, replace(ADAM, states=("square_avg", "acc_delta")), torch.optim.Adadelta)


@pytest.mark.parametrize("kind", [kind for kind, row in OPTIMIZERS.items() if EngineKind.deepspeed in row.engines])
def test_a_row_hands_on_every_setting_that_its_class_takes(kind: OptimizerKind) -> None:
    given = OptimizerConfig(kind=kind, lr=1.0, beta1=0.5, beta2=0.25, epsilon=0.125)
    row = OPTIMIZERS[kind]
    made = getattr(torch.optim, row.engines[EngineKind.deepspeed])
    taken = made([torch.nn.Parameter(torch.zeros(1))], **row.arguments(given)).defaults
    want = {"eps": given.epsilon, "betas": (given.beta1, given.beta2)}
    assert {name: taken[name] for name in want if name in taken} == {n: v for n, v in want.items() if n in taken}


@pytest.mark.layouts
@pytest.mark.parametrize("engine", EngineKind)
def test_every_engine_compares_the_row_with_the_class_before_it_trains(engine: EngineKind) -> None:
    (cause,) = run_ranks(1, _refused, engine)
    assert "AdamW keeps exp_avg, exp_avg_sq, step" in cause


def _refused(environment: Environment, engine: EngineKind) -> str:
    OPTIMIZERS[OptimizerKind.adamw] = replace(ADAM, states=ADAM.states[:1])  # in this process alone
    run = load_run_config([*BASE, f"engine={engine.value}"])
    with world(environment) as device:
        groups = ProcessGroups.create(Layout.from_config(run.parallel, 1), 0, device, run.run.seed)
        with pytest.raises(ConfigError) as caught:
            ENGINES[engine](build_model(run, groups), run, groups)
    return caught.value.cause
