"""verify: equal across formats, and every kind of difference found."""

from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from gpt4moe.convert.from_huggingface import from_huggingface
from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.convert.inference_layout import to_inference_layout
from gpt4moe.convert.verify import verify
from gpt4moe.errors import CheckpointError, ConversionError
from tests.checkpoint.builders import flip_bit


def is_equal(a: Path, b: Path, tolerance: float = 0.0) -> bool:
    answer = verify(a, b, tolerance=tolerance)
    assert answer["compared"] > 15
    return not any(answer[key] for key in ("different", "other_shape", "only_in_a", "only_in_b"))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_all_formats_of_one_model_are_equal(dtype: str, tmp_path: Path, trained: Path) -> None:
    to_huggingface(trained, tmp_path / "hf", dtype=dtype, max_shard_bytes=50_000)
    to_inference_layout(trained, tmp_path / "served", tp=2, pp=2, dtype=dtype)
    from_huggingface(tmp_path / "hf", tmp_path / "again")
    folders = (trained, tmp_path / "hf", tmp_path / "served", tmp_path / "again")
    for b in folders[1:3]:
        assert is_equal(trained, b) and is_equal(b, tmp_path / "again")
    # Back from bf16 to fp32 is fp32 again: what was lost shows.
    assert is_equal(trained, tmp_path / "again") == (dtype == "fp32")


def test_one_changed_value_is_named_with_its_size(tmp_path: Path, trained: Path) -> None:
    to_huggingface(trained, tmp_path / "hf", dtype="fp32")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"][5, 7] += 0.25
    save_file(tensors, file, metadata={"format": "pt"})
    (row,) = verify(trained, tmp_path / "hf")["different"]
    assert (row["tensor"], row["elements"]) == ("decoder.layers.1.mlp.experts.gate_up", 1)
    assert row["max_abs"] == pytest.approx(0.25)
    assert is_equal(trained, tmp_path / "hf", tolerance=0.3) and not is_equal(trained, tmp_path / "hf", tolerance=0.2)


def test_a_value_that_is_no_number_differs_at_any_tolerance(tmp_path: Path, trained: Path) -> None:
    to_huggingface(trained, tmp_path / "hf", dtype="fp32")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    assert not is_equal(trained, tmp_path / "hf", tolerance=1e30)


def test_another_model_shows_in_shapes_and_names(trained: Path, tied: Path) -> None:
    answer = verify(trained, tied)
    assert answer["only_in_a"] == ["output_layer.weight"] and answer["only_in_b"] == []
    assert [row["tensor"] for row in answer["other_shape"]] == ["embedding.word_embeddings.weight"]


def test_a_flipped_bit_in_an_inference_file_is_found(tmp_path: Path, trained: Path) -> None:
    to_inference_layout(trained, tmp_path / "served", tp=1, pp=1)
    file = tmp_path / "served" / "tp-00-pp-00.safetensors"
    flip_bit(file, file.stat().st_size - 5)
    with pytest.raises(CheckpointError, match="is damaged"):
        verify(trained, tmp_path / "served")


def test_a_folder_without_weights_is_refused(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(ConversionError, match="no folder with weights"):
        verify(trained, tmp_path)
