"""loaded_model: the model of a checkpoint on a layout of one's own, without training's engine."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.errors import LayoutError
from gpt4moe.inference.load import loaded_model
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
