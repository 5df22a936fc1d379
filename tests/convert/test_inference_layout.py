"""to-inference: one file a rank, cut as training cuts, uneven stages included."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from gpt4moe.checkpoint.reader import CheckpointReader
from gpt4moe.convert.inference_layout import to_inference_layout
from gpt4moe.convert.verify import verify
from gpt4moe.errors import ConversionError
from tests.training.command import train


@pytest.fixture(scope="module")
def five_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "five"
    pattern = ("model.num_layers=5", "model.moe.layer_pattern=[0,1,1,0,1]", "model.ffn_hidden_size=48")
    (ended,) = train(folder, "training.steps=1", "model.num_attention_heads=4", "model.num_query_groups=2", *pattern)
    assert ended.status == 0, ended.err
    return folder


def test_every_rank_holds_its_rectangles_and_all_together_everything(tmp_path: Path, five_layers: Path) -> None:
    answer = to_inference_layout(five_layers, tmp_path / "out", tp=2, pp=2, dtype="fp32")
    assert answer["layers_per_stage"] == [3, 2]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "index.json", "tp-00-pp-00.safetensors", "tp-00-pp-01.safetensors", "tp-01-pp-00.safetensors",
        "tp-01-pp-01.safetensors",
    ]  # fmt: skip
    reader = CheckpointReader(five_layers / "checkpoints" / "step-00000001")
    seen = {name: np.zeros(shape, int) for name, shape in reader.shapes.items() if name.startswith("weight/")}
    for tp in range(2):
        for pp in range(2):
            for key, values in load_file(tmp_path / "out" / f"tp-{tp:02d}-pp-{pp:02d}.safetensors").items():
                name, _, offset = key.rpartition("@")
                begin = map(int, offset.split(","))
                box = tuple(slice(o, o + n) for o, n in zip(begin, values.shape, strict=True))
                assert np.array_equal(values, reader.tensor(f"weight/{name}").numpy()[box]), key
                seen[f"weight/{name}"][box] += 1
                layer = re.search(r"layers\.(\d+)", name)
                assert layer is None or (int(layer.group(1)) < 3) == (pp == 0), key
                if "experts" in name:
                    assert (values.shape[0], int(offset.split(",")[0])) == (2, 2 * tp)  # of four
    for name, count in seen.items():
        wanted = 2 if "norm" in name or "router" in name else 1
        assert (count == wanted).all(), name


def test_listed_stages_are_taken(tmp_path: Path, five_layers: Path) -> None:
    to_inference_layout(five_layers, tmp_path / "out", tp=1, pp=3, layers_per_stage=[1, 1, 3])
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [file["layers"] for file in index["files"]] == [[0], [1], [2, 3, 4]]
    assert (index["tp"], index["pp"], index["dtype"], index["step"]) == (1, 3, "bfloat16", 1)
    assert verify(five_layers, tmp_path / "out")["different"] == []


def test_router_biases_and_shared_experts_go_to_their_ranks(tmp_path: Path) -> None:
    model = ("router@model.moe.router=sigmoid_bias", "model.moe.shared_expert_ffn_hidden_size=48",
             "model.moe.router.load_balancing_scope=global_batch")  # fmt: skip
    (ended,) = train(tmp_path / "run", "training.steps=1", *model)
    assert ended.status == 0, ended.err
    to_inference_layout(tmp_path / "run", tmp_path / "out", tp=2, pp=2, dtype="fp32")
    keys = load_file(tmp_path / "out" / "tp-01-pp-01.safetensors")
    assert np.abs(keys["decoder.layers.1.mlp.router.bias@0"]).max() > 0
    assert keys["decoder.layers.1.mlp.shared_experts.linear_fc1.weight@0,24,0"].shape == (2, 24, 32)
    assert not any("load_share" in key for key in keys)
    assert verify(tmp_path / "run", tmp_path / "out")["different"] == []


def test_the_last_stage_has_a_tied_embedding_too(tmp_path: Path, tied: Path) -> None:
    to_inference_layout(tied, tmp_path / "out", tp=1, pp=2)
    last = load_file_keys(tmp_path / "out" / "tp-00-pp-01.safetensors")
    assert "embedding.word_embeddings.weight@0,0" in last and not any("output_layer" in key for key in last)


@pytest.mark.parametrize(
    ("grid", "named"),
    [
        ({"tp": 4, "pp": 1}, "--tp 4 does not divide model.num_query_groups=2"),
        ({"tp": 3, "pp": 1}, r"(?s)--tp 3 does not divide .*Set --tp to one of \[1, 2\]"),  # fits every tensor
        ({"tp": 0, "pp": 1}, "--tp 0"),
        ({"tp": 1, "pp": 6}, "--pp 6 does not fit model.num_layers=5"),
        ({"tp": 1, "pp": 2, "layers_per_stage": [2, 2]}, "2 stages of 4 layers"),
        ({"tp": 1, "pp": 2, "layers_per_stage": [5, 0]}, "2 stages of 5 layers"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(
    grid: dict[str, object], named: str, tmp_path: Path, five_layers: Path
) -> None:
    with pytest.raises(ConversionError, match=named):
        to_inference_layout(five_layers, tmp_path / "out", **grid)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def load_file_keys(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        return list(file.keys())
