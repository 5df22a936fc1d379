"""The encoder of an export: the one that the model was trained with, whole and nothing else. Adapters as Idefics."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.retention import find_checkpoint
from gpt4moe.convert.command_line import answered, parser, status
from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.convert.idefics import to_idefics
from gpt4moe.convert.publish import Draft
from gpt4moe.convert.verify import verify
from gpt4moe.errors import CheckpointError, ConversionError
from tests.convert.vision_case import DENSE, IMAGE_ID, PARTS, encoder_words, pictures, rows_of, their_logits
from tests.training.command import train


def copy_of(source: Path, out: Path, *, is_known: bool = True) -> Path:
    """A copy of a run. is_known: False: it does not say which encoder it was trained with, as older ones."""
    shutil.copytree(source, out)
    step = find_checkpoint(out)
    manifest = Manifest.load(step)
    kept = {key: value for key, value in manifest.identity.items() if is_known or key != "encoder"}
    assert "encoder" in manifest.identity
    dataclasses.replace(manifest, identity=kept).save(step)
    return out


def encoder_with(clip: Path, out: Path, **changed: np.ndarray | None) -> Path:
    """A copy of the encoder with some other tensors; None: without it."""
    shutil.copytree(clip, out)
    tensors = load_file(out / "model.safetensors")
    tensors |= {name: value for name, value in changed.items() if value is not None}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in changed or changed[name] is not None}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def other_norm(clip: Path, out: Path) -> Path:
    name = next(name for name in load_file(clip / "model.safetensors") if name.endswith("pre_layrnorm.weight"))
    return encoder_with(clip, out, **{name: np.ones(16, dtype=np.float32)})


def test_an_encoder_that_the_model_was_not_trained_with_is_refused(dense: Path, clip: Path, tmp_path: Path) -> None:
    other, moved = other_norm(clip, tmp_path / "other"), shutil.copytree(clip, tmp_path / "moved")
    plain = shutil.copytree(clip, tmp_path / "plain")
    (plain / "preprocessor_config.json").unlink()
    old = copy_of(dense, tmp_path / "old", is_known=False)
    for export in (to_huggingface, partial(to_idefics, without_clips=True)):
        with pytest.raises(ConversionError, match=r"another encoder than .* trained with: weights sha256") as refused:
            export(dense, tmp_path / "out", encoder=other)
        assert "--encoder" in refused.value.cure
        with pytest.raises(ConversionError, match=r"another encoder than .*: image_mean"):
            export(dense, tmp_path / "out", encoder=plain)
        note = "does not say which encoder"
        assert note not in str(export(dense, tmp_path / "out", encoder=moved, dry_run=True)["notes"])
        assert note in str(export(old, tmp_path / "out", encoder=other, dry_run=True)["notes"])


def test_a_killed_export_begins_anew_with_another_encoder_at_the_same_place(
    dense: Path, clip: Path, tmp_path: Path
) -> None:
    old, here = copy_of(dense, tmp_path / "old", is_known=False), tmp_path / "here"
    for export in (to_huggingface, partial(to_idefics, without_clips=True)):
        shutil.copytree(clip, here)
        with patch.object(Draft, "json", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            export(old, tmp_path / "out", encoder=here)
        first = (tmp_path / "out.partial" / ".plan").read_text()
        shutil.rmtree(here)
        other_norm(clip, here)
        with patch.object(Draft, "json", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            export(old, tmp_path / "out", encoder=here)
        assert (tmp_path / "out.partial" / ".plan").read_text() != first
        shutil.rmtree(tmp_path / "out.partial")
        shutil.rmtree(here)


def test_verify_takes_an_encoder_for_the_side_that_lost_its_own(dense: Path, clip: Path, tmp_path: Path) -> None:
    to_huggingface(dense, tmp_path / "exported", dtype="fp32")
    found = verify(dense, tmp_path / "exported", encoder=shutil.copytree(clip, tmp_path / "moved"))
    assert status(found) == 0 and found["notes"] == []
    old = copy_of(dense, tmp_path / "old", is_known=False)
    with pytest.raises(ConversionError, match="own folders are both there"):
        verify(dense, old, encoder=clip)
    hidden = clip.rename(clip.with_name("hidden"))
    try:
        with pytest.raises(ConversionError, match="compared with itself") as refused:
            verify(dense, old, encoder=hidden)
        assert "--text-only" in refused.value.cure
        assert status(verify(dense, copy_of(dense, tmp_path / "copy"), encoder=hidden)) == 0
        assert status(verify(dense, tmp_path / "exported", encoder=hidden)) == 0
    finally:
        hidden.rename(clip)
    with pytest.raises(ConversionError, match="neither was trained with a folder"):
        verify(tmp_path / "exported", tmp_path / "exported", encoder=clip)


def test_verify_finds_encoders_that_compute_something_else(dense: Path, tmp_path: Path) -> None:
    to_huggingface(dense, tmp_path / "exported", dtype="fp32")
    path = tmp_path / "exported" / "vision" / "encoder" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "num_attention_heads": 2}))
    Draft(tmp_path / "exported").checksums("vision/SHA256SUMS")
    found = verify(dense, tmp_path / "exported")
    assert [row["setting"].removeprefix("vision.encoder.") for row in found["settings"]] == [
        "hidden_act", "layer_norm_eps", "num_attention_heads"
    ]  # fmt: skip
    assert status(found) == 1


def test_what_is_none_of_the_encoder_is_left_out_and_what_is_missing_refused(
    dense: Path, clip: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    old = copy_of(dense, tmp_path / "old", is_known=False)
    projected = {"visual_projection.weight": np.ones((8, 16), dtype=np.float32)}
    more = encoder_with(clip, tmp_path / "more", **projected)
    answer = to_huggingface(old, tmp_path / "exported", dtype="fp32", encoder=more)
    assert "Left out of the encoder, as no feature needs it: visual_projection.weight." in answer["notes"]
    to_huggingface(dense, tmp_path / "plain", dtype="fp32")
    cases = rows_of([pictures(tmp_path_factory.mktemp("pictures"), 1)])
    for name in ("exported", "plain"):
        path = tmp_path / name / "vision" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"image_token_id": IMAGE_ID}))
    theirs = [their_logits(tmp_path / name, cases)[0] for name in ("exported", "plain")]
    assert np.array_equal(*theirs), "it loads, and is the same"
    to_idefics(old, tmp_path / "idefics", dtype="fp32", encoder=more, without_clips=True)
    assert not [name for name in load_file(tmp_path / "idefics" / "model.safetensors") if "projection" in name]
    lost = next(name for name in load_file(clip / "model.safetensors") if name.endswith("class_embedding"))
    less = encoder_with(clip, tmp_path / "less", **{lost: None})
    for export in (to_huggingface, partial(to_idefics, without_clips=True)):
        with pytest.raises(ConversionError, match=r"no weights for 1 tensors .*, e\.g\. embeddings\.class_embedding"):
            export(old, tmp_path / "out", encoder=less)


def test_adapters_become_idefics_with_their_base_wherever_it_lies(dense: Path, clip: Path, tmp_path: Path) -> None:
    lora = ("stage.lora.rank=2", "stage.train=[]", "optimizer.by_pattern=[]", f"checkpoint.load={dense}")
    (ended,) = train(tmp_path / "adapted", *DENSE, *PARTS, *encoder_words(clip), *lora)
    assert ended.status == 0, ended.err
    moved = dense.rename(dense.with_name("moved"))
    try:
        place = ["to-idefics", str(tmp_path / "adapted"), str(tmp_path / "out"), "--without-clips", "--dtype", "fp32"]
        with pytest.raises(CheckpointError, match=r"is gone|no checkpoint"):
            answered(parser("").parse_args(place), lambda *_: [])
        answered(parser("").parse_args([*place, "--base", str(moved)]), lambda *_: [])
    finally:
        moved.rename(dense)
    to_idefics(dense, tmp_path / "base", dtype="fp32", without_clips=True)
    ours, base = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "base"))
    assert ours.keys() == base.keys()
    moved_names = {name for name in ours if not np.array_equal(ours[name], base[name])}
    assert moved_names and all(name.startswith("model.layers.") for name in moved_names)
