"""from-hf: a tied output layer that is in the file, Mistral's own files beside the shards, a fractional rope_theta."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpt4moe.convert.from_huggingface import Upcycling, from_huggingface
from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.convert.verify import verify
from gpt4moe.errors import ConversionError
from tests.convert.hf_models import MIXTURE, save_model
from tests.convert.logits import our_logits, their_logits
from tests.convert.test_bad_input import convert


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tied") / "hf", "Llama", tie_word_embeddings=True)


def _with_output(source: Path, copy: Path, change: float) -> np.ndarray:
    """A copy of the folder that also has lm_head.weight: the embedding, one element of it moved by `change`."""
    shutil.copytree(source, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"][200, 3] += change
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return tensors["lm_head.weight"]


def test_an_output_layer_equal_to_the_tied_embedding_is_accepted(tmp_path: Path, tied_llama: Path) -> None:
    _with_output(tied_llama, tmp_path / "hf", 0.0)
    from_huggingface(tmp_path / "hf", tmp_path / "ours")
    assert np.abs(our_logits(tmp_path / "ours") - their_logits(tmp_path / "hf")[0]).max() < 1e-4
    assert verify(tmp_path / "hf", tied_llama)["different"] == []


def test_an_output_layer_other_than_the_tied_embedding_is_refused(tmp_path: Path, tied_llama: Path) -> None:
    """transformers takes the file's lm_head.weight, whatever config.json says: a tied model would answer otherwise."""
    _with_output(tied_llama, tmp_path / "hf", 1.0)
    gap = np.abs(their_logits(tmp_path / "hf")[0] - their_logits(tied_llama)[0])
    assert gap[..., 200].max() > 0.1
    for upcycling in (None, Upcycling(num_experts=4)):
        with pytest.raises(ConversionError, match=r"tie_word_embeddings=true, but lm_head.weight in model.safetensors"):
            from_huggingface(tmp_path / "hf", tmp_path / "ours", upcycling)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_the_cure_for_another_output_layer_gives_the_logits_of_transformers(tmp_path: Path, tied_llama: Path) -> None:
    output = _with_output(tied_llama, tmp_path / "hf", 1.0)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    from_huggingface(tmp_path / "hf", tmp_path / "ours")
    assert np.abs(our_logits(tmp_path / "ours") - their_logits(tmp_path / "hf")[0]).max() < 1e-4
    to_huggingface(tmp_path / "ours", tmp_path / "back", dtype="fp32")
    assert np.array_equal(load_file(tmp_path / "back" / "model.safetensors")["lm_head.weight"], output)


def test_an_output_layer_of_another_shape_is_refused(tmp_path: Path, tied_llama: Path) -> None:
    shutil.copytree(tied_llama, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][:-1].copy()
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"tie_word_embeddings=true, but lm_head.weight"):
        from_huggingface(tmp_path / "hf", tmp_path / "ours")


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"], ids=["one file", "shards"])
def test_mistral_s_own_files_beside_the_shards_are_not_read(shard_size: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "hf", "Mistral", shard_size=shard_size, sliding_window=None)
    plain = from_huggingface(source, tmp_path / "plain")
    save_file({"layers.0.attention.wq.weight": np.ones((4, 4), np.float32)}, source / "consolidated.safetensors")
    ended = convert("from-hf", source, tmp_path / "ours", "--json")
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout)
    assert plain["notes"] == [] and "consolidated.safetensors was not read" in answer["notes"][0]
    assert answer["parameters"] == plain["parameters"]
    assert verify(tmp_path / "plain", tmp_path / "ours")["different"] == []
    assert np.abs(our_logits(tmp_path / "ours") - their_logits(source)[0]).max() < 1e-4


def test_a_folder_of_mistral_s_own_files_alone_is_refused(tmp_path: Path, mixtral: Path) -> None:
    source = shutil.copytree(mixtral, tmp_path / "hf")
    (source / "model.safetensors").rename(source / "consolidated.safetensors")
    with pytest.raises(ConversionError, match="lacks safetensors files"):
        from_huggingface(source, tmp_path / "ours")


@pytest.mark.parametrize("rope_theta", [3.5, 1000000.5])
@pytest.mark.parametrize("form", ["rope_parameters", "rope_theta"])
def test_a_fractional_rope_theta_goes_both_ways(rope_theta: float, form: str, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": rope_theta}
    source = save_model(tmp_path / "hf", "Mixtral", **MIXTURE, rope_parameters=rope)
    config = json.loads((source / "config.json").read_text())
    if form == "rope_theta":  # as transformers before 5 wrote it
        del config["rope_parameters"]
        (source / "config.json").write_text(json.dumps(config | {"rope_theta": rope_theta}))
    from_huggingface(source, tmp_path / "ours")
    assert np.abs(our_logits(tmp_path / "ours") - their_logits(source)[0]).max() < 1e-4
    to_huggingface(tmp_path / "ours", tmp_path / "back", dtype="fp32")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["rope_theta"] == back["rope_parameters"]["rope_theta"] == rope_theta
    assert np.array_equal(their_logits(tmp_path / "back")[0], their_logits(source)[0])


@pytest.mark.parametrize("rope_theta", [0, -1.0, float("nan"), float("inf")])
def test_a_rope_theta_that_is_no_positive_number_is_refused(rope_theta: float, tmp_path: Path, mixtral: Path) -> None:
    source = shutil.copytree(mixtral, tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"]
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": rope_theta}))
    with pytest.raises(ConversionError, match=r"rope_theta=.* is no positive number"):
        from_huggingface(source, tmp_path / "ours")
