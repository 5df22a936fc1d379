"""verify: equal across formats, and every kind of difference found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from safetensors.numpy import load_file, save_file

from gpt4moe.config.typed import sealed, unsealed
from gpt4moe.convert.from_huggingface import from_huggingface
from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.convert.inference_layout import to_inference_layout
from gpt4moe.convert.safetensors_file import RawFile
from gpt4moe.convert.verify import DIFFERENCES, verify
from gpt4moe.errors import CheckpointError, ConversionError
from tests.checkpoint.builders import flip_bit


def is_equal(a: Path, b: Path, tolerance: float = 0.0) -> bool:
    answer = verify(a, b, tolerance=tolerance)
    assert answer["compared"] > 15
    return not any(answer[key] for key in DIFFERENCES)


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


def test_a_rank_whose_copy_of_a_router_is_another_is_named(tmp_path: Path, trained: Path) -> None:
    served = tmp_path / "served"
    to_inference_layout(trained, served, tp=2, pp=1, dtype="fp32")
    file, key = served / "tp-01-pp-00.safetensors", "decoder.layers.0.mlp.router.weight@0,0"
    header = RawFile(file)
    with file.open("r+b") as data:
        data.seek(header.data_start + header.tensors[key].start)
        data.write(bytes(4))
    _rehash(served, file.name)
    assert verify(trained, served)["copies"] == [f"{served}: decoder.layers.0.mlp.router.weight in {file.name}"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: index["config"]["model"].update(rope_theta=5.0), None),
        (lambda index: index.update(layers_per_stage=[1, 1, 1], pp=3), "3 stages of 3 layers"),
        (lambda index: index["files"].reverse(), None),
        (lambda index: index.update(tp=1), "not those of its grid"),
    ],
    ids=["settings", "stages", "order", "grid"],
)
def test_an_index_that_does_not_fit_its_files_is_noticed(
    change: Callable[[dict[str, Any]], None], said: str | None, tmp_path: Path, trained: Path
) -> None:
    served = tmp_path / "served"
    to_inference_layout(trained, served, tp=2, pp=2)
    text = (served / "index.json").read_text()
    (served / "index.json").write_text(text.replace('"tp": 2', '"tp": 3'))
    with pytest.raises(ConversionError, match="its sha256 differs"):
        verify(trained, served)
    index = json.loads(unsealed(text) or "")
    change(index)
    (served / "index.json").write_text(sealed(json.dumps(index)))
    if said is not None:
        with pytest.raises(ConversionError, match=said):
            verify(trained, served)
    else:
        settings = verify(trained, served)["settings"]
        changed = index["config"]["model"]["rope_theta"] == 5.0
        assert settings == ([{"setting": "rope_theta", "a": 10000.0, "b": 5.0}] if changed else [])


def _rehash(served: Path, name: str) -> None:
    """The index as a writer would have made it of the file's present bytes."""
    index = json.loads(unsealed((served / "index.json").read_text()) or "")
    (entry,) = (file for file in index["files"] if file["name"] == name)
    data = (served / name).read_bytes()[entry["header_bytes"] :]
    assert len(entry["block_hashes"]) == 1
    entry["block_hashes"] = [xxhash.xxh3_64_hexdigest(data)]
    (served / "index.json").write_text(sealed(json.dumps(index)))


def test_a_folder_without_weights_is_refused(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(ConversionError, match="no folder with weights"):
        verify(trained, tmp_path)
