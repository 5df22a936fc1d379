"""from-hf of a folder with vision/: a vision checkpoint of the same tensors, which a run begins with."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt4moe.checkpoint.inspection import verification
from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.retention import find_checkpoint
from gpt4moe.convert.from_huggingface import Upcycling, from_huggingface
from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.convert.verify import DIFFERENCES, verify
from gpt4moe.errors import ConversionError
from tests.convert.vision_case import IMAGE_ID, our_logits, pictures, rows_of, with_config
from tests.training.command import contents, train


@pytest.fixture(scope="module")
def exported(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a dense model with a CLIP encoder, in fp32."""
    out = tmp_path_factory.mktemp("exports") / "exported"
    to_huggingface(dense, out, dtype="fp32")
    return out


@pytest.fixture(scope="module")
def imported(exported: Path) -> Path:
    out = exported.parent / "imported"
    moved = shutil.copytree(exported, exported.parent / "moved")
    from_huggingface(moved, out)
    shutil.rmtree(moved)  # the encoder is the checkpoint's own
    return out


def test_it_is_the_checkpoint_that_was_exported(dense: Path, exported: Path, imported: Path, tmp_path: Path) -> None:
    assert verification(imported)["problems"] == []
    found = verify(dense, imported)
    assert not any(found[key] for key in DIFFERENCES) and found["compared"] == verify(dense, exported)["compared"]
    to_huggingface(imported, tmp_path / "again", dtype="fp32")
    first, again = contents(exported / "vision"), contents(tmp_path / "again" / "vision")
    assert first == again


def test_a_run_begins_with_it_and_knows_its_encoder(imported: Path, tmp_path: Path) -> None:
    assert Manifest.load(imported).encoder is not None
    arguments = (imported / "model.args").read_text().split()
    (ended,) = train(
        tmp_path / "run", "stage=vision", "training.steps=1", f"checkpoint.load={imported}", *arguments
    )  # fmt: skip
    assert ended.status == 0, ended.err
    assert "another image encoder" not in ended.err and "initial values" not in ended.err
    assert Manifest.load(find_checkpoint(tmp_path / "run")).encoder == Manifest.load(imported).encoder


def test_a_dense_model_upcycled_with_its_vision_parts_gives_the_same_logits(
    dense: Path, exported: Path, tmp_path: Path
) -> None:
    from_huggingface(exported, tmp_path / "upcycled", Upcycling(num_experts=4))
    a, b, c, _ = pictures(tmp_path / "pictures", 4)
    cases = rows_of([[a], [b]], [[c, b]], [])
    for own, theirs in zip(
        our_logits(dense, IMAGE_ID, cases), our_logits(tmp_path / "upcycled", IMAGE_ID, cases), strict=True
    ):
        assert np.abs(own - theirs).max() < 1e-4 and np.abs(own).max() > 0.5


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda config: config.update(rms_norm_eps=0.5), r"config\.json has rms_norm_eps=0\.5, but the text model"),
        (lambda config: config.update(num_attention_heads=2), "has num_attention_heads=2, but"),
        (lambda config: config["preprocessing"].update(mean=[0.0, 0.0, 0.0]), "has preprocessing="),
        (lambda config: config.update(cross_attention_every=1), "has no tensor gated_cross_attn_layers"),
        (lambda config: config.pop("resampler"), r"config\.json cannot be read \('resampler'\)"),
        (lambda config: config.update(intermediate_size="wide"), r"config\.json cannot be read"),
    ],
    ids=["epsilon", "heads", "pixels", "blocks", "resampler", "text"],
)
def test_parts_that_do_not_belong_together_are_refused(
    change: Callable[[dict[str, Any]], object], cause: str, exported: Path, tmp_path: Path
) -> None:
    wrong = with_config(exported, tmp_path / "wrong", change)
    with pytest.raises(ConversionError, match=cause) as refused:
        from_huggingface(wrong, tmp_path / "out")
    assert refused.value.cure and "\n" not in refused.value.cause
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_damage_and_a_path_that_arguments_cannot_name_are_refused(exported: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "vision" / "encoder" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ConversionError, match=r"encoder/model\.safetensors is not what was written"):
        from_huggingface(copy, tmp_path / "out")
    for name in ("a b", "modèle", "~user"):  # Hydra reads the latter two no more than a shell the first
        with pytest.raises(ConversionError, match="takes without quotes"):
            from_huggingface(exported, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
