"""checkpoint.load_only: which tensors a new run takes, every one accounted for."""

from pathlib import Path

import pytest

from gpt4moe.checkpoint.selection import select
from gpt4moe.errors import CheckpointError, ConfigError

MODEL = [
    "weight/embedding.weight",
    "weight/decoder.layers.0.mlp.router.weight",
    "buffer/decoder.layers.0.mlp.router.bias",
]
FOLDER = Path("runs/first")


def test_without_patterns_both_sides_must_be_the_same() -> None:
    assert select(FOLDER, MODEL, MODEL, []).loaded == sorted(MODEL)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors that the model needs, e.+ buffer/"):
        select(FOLDER, MODEL[:2], MODEL, [])
    with pytest.raises(CheckpointError, match=r"has 1 tensors that the model has not, e.+ weight/vision"):
        select(FOLDER, [*MODEL, "weight/vision.patch.weight"], MODEL, [])


def test_vision_parts_may_be_on_one_side_alone_but_not_in_pieces() -> None:
    parts = ["weight/decoder.layers.0.gated_cross_attention.mlp_gate", "weight/resampler.latents"]
    begins = select(FOLDER, MODEL, [*MODEL, *parts], [])
    assert (begins.loaded, begins.initial) == (sorted(MODEL), parts)
    back = select(FOLDER, [*MODEL, *parts], MODEL, [])
    assert (back.loaded, back.unused) == (sorted(MODEL), parts)
    with pytest.raises(CheckpointError, match="lacks 1 tensors that the model needs"):
        select(FOLDER, [*MODEL, parts[0]], [*MODEL, *parts], [])
    with pytest.raises(CheckpointError, match="has 1 tensors that the model has not"):
        select(FOLDER, [*MODEL, *parts, "weight/output_layer.weight"], MODEL, [])


def test_every_tensor_is_loaded_initial_or_unused() -> None:
    wanted = [*MODEL, "weight/vision.patch.weight"]
    stored = [*MODEL, "weight/output_layer.weight"]
    chosen = select(FOLDER, stored, wanted, ["decoder.*"])
    assert chosen.loaded == sorted(MODEL[1:])
    assert chosen.initial == ["weight/embedding.weight", "weight/vision.patch.weight"]
    assert chosen.unused == ["weight/embedding.weight", "weight/output_layer.weight"]
    assert "2 tensors; 2 from their initial values (weight/embedding.weight, " in chosen.describe()


def test_each_pattern_must_match_the_model_and_what_it_matches_must_be_there() -> None:
    with pytest.raises(ConfigError, match="matches none of the 3 tensors"):
        select(FOLDER, MODEL, MODEL, ["embedding.*", "decodr.*"])
    with pytest.raises(CheckpointError, match="lacks 1 tensors"):
        select(FOLDER, MODEL[1:], MODEL, ["embedding.*"])
