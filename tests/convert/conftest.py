"""Checkpoints that the conversion tests read; nobody writes into them."""

from pathlib import Path

import pytest

from tests.convert.hf_models import MIXTURE, save_model
from tests.convert.vision_case import DENSE, PARTS, encoder_words, save_clip
from tests.numbered_lines import numbered_lines
from tests.spawn import run_ranks
from tests.training.command import train

# Grouped-query attention, and weights large enough that a wrong row shows in the logits.
SHAPE = ("model.num_attention_heads=4", "model.num_query_groups=2", "model.init_std=0.1", "training.steps=3")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of one source with a vocabulary of 300."""
    return numbered_lines(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The run folder of three steps on text, on two ranks: tensor and expert parallel, optimizer sharded."""
    data = ("data.kind=indexed", f"data.path={corpus}", "model.vocab_size=300")
    return _run(tmp_path_factory, "trained", *SHAPE, *data, "parallel.tp=2", "parallel.ep=2", ranks=2)


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings, synthetic tokens, no tokenizer; one rank."""
    return _run(tmp_path_factory, "tied", *SHAPE, "model.tied_embeddings=true")


@pytest.fixture(scope="session")
def normed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Norms of queries and keys, heads of their own width, a dense layer: a Qwen3-MoE."""
    model = ("model.qk_norm=true", "model.head_dim=12", "model.moe.layer_pattern=[0,1]", "model.ffn_hidden_size=48")
    return _run(tmp_path_factory, "normed", *SHAPE, *model)


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of random weights."""
    return save_model(tmp_path_factory.mktemp("mixtral") / "hf", "Mixtral", **MIXTURE)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders") / "clip"
    run_ranks(1, save_clip, folder)
    return folder


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Path:
    """Three steps of a dense vision model with a CLIP encoder of a folder."""
    folder = tmp_path_factory.mktemp("runs") / "dense"
    (ended,) = train(folder, *DENSE, *PARTS, *encoder_words(clip))
    assert ended.status == 0, ended.err
    return folder


def _run(factory: pytest.TempPathFactory, name: str, *overrides: str, ranks: int = 1) -> Path:
    folder = factory.mktemp("runs") / name
    ended = train(folder, *overrides, ranks=ranks)
    assert ended[0].status == 0, ended[0].err
    return folder
