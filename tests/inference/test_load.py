"""loaded_model: the model of a checkpoint on a layout of one's own, without training's engine."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt4moe.config.kernels import AttentionKernel, ExpertKernel, FusedKernel, KernelsConfig, NormKernel, SwiGluKernel
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import LayoutError
from gpt4moe.inference.load import Opened, loaded_model, placed_run
from gpt4moe.inference.text import Words
from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks
from tests.training.command import train

TOKENS = np.random.default_rng(0).integers(0, 128, (2, 16))


@torch.no_grad()
def _logits(environment: Environment, folder: Path, parallel: ParallelConfig | None) -> np.ndarray:
    """[2, 16, V / tp] of the vocabulary's part that this rank has."""
    tokens = torch.from_numpy(TOKENS)
    with loaded_model(folder, parallel=parallel, environment=environment) as model:
        assert not model.chunk.training and model.step == 1
        return model.chunk(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None).float().numpy()


def _layout_refused(environment: Environment, folder: Path, parallel: ParallelConfig) -> bool:
    with pytest.raises(LayoutError), loaded_model(folder, parallel=parallel, environment=environment):
        pass
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inference") / "run"
    (ended,) = train(path, "training.steps=1")
    assert ended.status == 0, ended.err
    return path


def test_a_checkpoint_of_one_process_answers_the_same_on_tp2(folder: Path) -> None:
    (whole,) = run_ranks(1, _logits, folder, None)
    parts = run_ranks(2, _logits, folder, ParallelConfig(tp=2, ep=2))
    np.testing.assert_allclose(np.concatenate(parts, axis=-1), whole, atol=1e-5)  # sums in another order
    assert np.abs(whole).max() > 0.1


def test_a_layout_that_does_not_fit_the_world_is_refused(folder: Path) -> None:
    assert run_ranks(2, _layout_refused, folder, ParallelConfig(tp=4)) == [True, True]


def test_no_weights_are_drawn_for_a_model_that_is_loaded(folder: Path) -> None:
    assert run_ranks(1, _loaded_without_drawing, folder) == [True]


def _loaded_without_drawing(environment: Environment, folder: Path) -> bool:
    from gpt4moe.model import parameters

    del parameters.normal_box  # an attempt to draw would be a NameError
    with loaded_model(folder, environment=environment) as model:
        return all(bool(parameter.isfinite().all()) for parameter in model.chunk.parameters())


def test_a_model_is_gone_when_nobody_holds_it(folder: Path) -> None:
    """A cycle would keep the weights until Python looks for cycles: the next model is then loaded beside them."""
    assert run_ranks(1, _kept_after_load, folder) == [[]]


def _kept_after_load(environment: Environment, folder: Path) -> list[str]:
    with loaded_model(folder, environment=environment):
        pass  # once before: what is imported on the way makes cycles of its own
    gc.collect()
    gc.disable()
    with loaded_model(folder, environment=environment) as model:
        held = {name: weakref.ref(parameter) for name, parameter in model.chunk.named_parameters()}
    del model
    return [name for name, parameter in held.items() if parameter() is not None]


def _no_words() -> Words:
    raise AssertionError("nobody asks for a tokenizer")


@pytest.mark.parametrize(("trained_with", "loaded_with"), [("torch", "torch"), ("triton", "auto"), ("auto", "auto")])
def test_a_loaded_model_asks_for_no_package_that_training_did_not_choose(trained_with: str, loaded_with: str) -> None:
    run = RunConfig()
    run.kernels = KernelsConfig(
        attention=AttentionKernel.transformer_engine, norm=NormKernel.apex, experts=ExpertKernel.grouped_mm,
        swiglu=SwiGluKernel(trained_with), rotary=FusedKernel(trained_with), cross_entropy=FusedKernel(trained_with),
        router=FusedKernel(trained_with),
    )  # fmt: skip
    placed = placed_run(Opened(run=run, reader=None, step=0, words=_no_words))
    assert placed.kernels == KernelsConfig(
        experts=ExpertKernel.grouped_mm, swiglu=SwiGluKernel(loaded_with), rotary=FusedKernel(loaded_with),
        cross_entropy=FusedKernel(loaded_with), router=FusedKernel(loaded_with),
    )  # fmt: skip
    assert run.kernels.norm is NormKernel.apex
