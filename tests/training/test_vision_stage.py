"""stage=vision by the train command: it begins from a text checkpoint, and its checkpoint gives the text model back."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from gpt4moe.architecture.names import adapter_names
from gpt4moe.architecture.vision import is_vision
from gpt4moe.checkpoint.inspection import difference
from gpt4moe.checkpoint.reader import CheckpointReader
from gpt4moe.convert.adapters import merge
from gpt4moe.convert.command_line import status
from gpt4moe.convert.inference_layout import to_inference_layout
from gpt4moe.convert.verify import open_weights, verify
from tests.training.command import contents, metrics, train

VISION = (
    "stage=vision", "+vision@model.vision=tiny", "model.vision.encoder.hidden_size=16",
    "model.vision.encoder.ffn_hidden_size=16", "model.vision.encoder.num_layers=1", "model.vision.ffn_hidden_size=24",
)  # fmt: skip
STILL = ("training.steps=1", "optimizer.lr=1e-30", "run.seed=7")


def last(folder: Path) -> CheckpointReader:
    return CheckpointReader(max((folder / "checkpoints").iterdir()))


def texts(reader: CheckpointReader) -> list[str]:
    return [name for name in reader.shapes if name.startswith(("weight/", "buffer/")) and not is_vision(name[7:])]


@pytest.fixture(scope="module")
def vision_run(tmp_path_factory: pytest.TempPathFactory, whole_run: Path) -> Path:
    """Two steps of the vision stage on two pipeline stages, from a text run, and two more in one process."""
    folder = tmp_path_factory.mktemp("vision") / "vision"
    begun = train(folder, *VISION, "training.steps=2", "parallel.pp=2", f"checkpoint.load={whole_run}", ranks=2)
    assert [rank.status for rank in begun] == [0, 0], begun[0].err
    assert "tensors; 44 from their initial values (weight/decoder.layers.0.gated_cross_attention." in begun[0].out
    (ended,) = train(folder, *VISION, "training.steps=4")
    assert ended.status == 0, ended.err
    assert "resume after step 2" in ended.out
    return folder


def test_a_text_checkpoint_begins_a_vision_run_and_text_weights_stay_as_they_are(
    vision_run: Path, whole_run: Path
) -> None:
    assert [record["step"] for record in metrics(vision_run)] == [1, 2, 3, 4]
    text, vision = last(whole_run), last(vision_run)
    assert set(texts(text)) == set(texts(vision)) and len(texts(text)) > 10
    for name in texts(text):
        assert vision.tensor(name).equal(text.tensor(name)), name
    gates = [vision.tensor(name) for name in vision.shapes if name.startswith("weight/") and name.endswith("mlp_gate")]
    assert len(gates) == 2 and all(gate.abs() > 0 for gate in gates)
    moments = [name for name in vision.shapes if name.startswith("exp_avg/")]
    assert moments and all(is_vision(name.removeprefix("exp_avg/")) for name in moments)


def test_a_vision_checkpoint_gives_its_text_model_back(vision_run: Path, whole_run: Path, tmp_path: Path) -> None:
    (ended,) = train(tmp_path / "text", *STILL, f"checkpoint.load={vision_run}")
    assert ended.status == 0, ended.err
    assert "44 of the checkpoint not used (weight/decoder.layers.0.gated_cross_attention." in ended.out
    text, again = last(whole_run), last(tmp_path / "text")
    assert set(texts(again)) == {name for name in again.shapes if name.startswith(("weight/", "buffer/"))}
    for name in texts(text):
        assert again.tensor(name).equal(text.tensor(name)), name


def test_a_text_checkpoint_of_another_width_is_refused_before_anything_is_built(
    whole_run: Path, tmp_path: Path
) -> None:
    wide = ("model.hidden_size=64", "parallel.tp=2", f"checkpoint.load={whole_run}")
    ended = train(tmp_path / "x", *VISION, *wide, ranks=2)
    assert [rank.status for rank in ended] == [2, 2]
    cause, cure = ended[0].err.splitlines()
    assert "is (32,); the model's is (64,)" in cause and "manifest.json" in cure


def test_the_difference_to_the_text_checkpoint_is_the_vision_parts(vision_run: Path, whole_run: Path) -> None:
    found = difference(whole_run, vision_run, tolerance=0.0)
    assert found["compared"] > 10
    weights = [name for name in found["only_in_b"] if name.startswith("weight/")]
    assert len(weights) == 44 and all(is_vision(name.removeprefix("weight/")) for name in weights)
    assert [row for row in found["different"] if row["tensor"].startswith(("weight/", "buffer/"))] == []
    assert found["other_shape"] == []


LORA = ("stage.lora.rank=4", "stage.train=[]", "optimizer.by_pattern=[]", "optimizer.lr=0.01")


def test_adapters_of_a_vision_model_are_trained_beside_frozen_vision_parts_and_merged(
    vision_run: Path, tmp_path: Path
) -> None:
    words = (*VISION, *LORA, f"checkpoint.load={vision_run}")
    begun = train(tmp_path / "adapted", *words, "training.steps=1", "parallel.pp=2", ranks=2)
    assert [rank.status for rank in begun] == [0, 0], begun[0].err
    (ended,) = train(tmp_path / "adapted", *words, "training.steps=2")
    assert ended.status == 0 and "resume after step 1" in ended.out, ended.err
    adapters, base = last(tmp_path / "adapted"), last(vision_run)
    assert all(name.endswith(("lora_a", "lora_b")) for name in adapters.shapes)
    merge(tmp_path / "adapted", tmp_path / "merged")
    merged = CheckpointReader(tmp_path / "merged")
    assert merged.shapes.keys() == {name for name in base.shapes if name.startswith(("weight/", "buffer/"))}
    moved = {name for name in merged.shapes if not merged.tensor(name).equal(base.tensor(name))}
    assert moved == {name for name in merged.shapes if adapter_names(name)[0] in adapters.shapes} != set()
    to_inference_layout(tmp_path / "adapted", tmp_path / "served", tp=2, pp=1, dtype="fp32")
    found = verify(tmp_path / "adapted", tmp_path / "served")
    assert found["compared"] == len(open_weights(tmp_path / "served").shapes) and status(found) == 0
    from_merged = (*VISION, *STILL, f"checkpoint.load={tmp_path / 'merged'}")
    (refused,) = train(tmp_path / "again", *from_merged)
    assert refused.status == 2 and "draws another fresh encoder than run.seed=" in refused.err, refused.err
    (again,) = train(tmp_path / "again", *from_merged, "checkpoint.load_only=['*']")
    assert again.status == 0, again.err


def test_adapters_of_a_vision_model_need_a_base_with_vision_parts(whole_run: Path, tmp_path: Path) -> None:
    (ended,) = train(tmp_path / "x", *VISION, *LORA, f"checkpoint.load={whole_run}")
    assert ended.status == 2
    cause, cure = ended.err.splitlines()
    assert "has no vision parts: with stage.lora they would be frozen" in cause and "Train them first" in cure


def test_vision_parts_without_images_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    (ended,) = train(tmp_path / "x", "+vision@model.vision=tiny")
    assert ended.status == 2 and "stage=pretrain reads no images" in ended.err


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of one step with an encoder of a folder; and that folder."""
    root = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(root / "siglip")
    (ended,) = train(root / "run", *_of_folder(root / "siglip"), "training.steps=1")
    assert ended.status == 0, ended.err
    return root / "run", root / "siglip"


def _of_folder(folder: Path) -> tuple[str, ...]:
    more = (f"model.vision.encoder.folder={folder}", "model.vision.encoder.image_size=32")
    return (*VISION, "model.vision.encoder.kind=folder", *more, "model.vision.encoder.patch_size=8",
            "model.vision.encoder.num_attention_heads=2")  # fmt: skip


def test_a_run_goes_on_with_the_encoder_that_it_began_with_wherever_it_lies(
    folder_run: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(folder_run[0], tmp_path / "run")
    shutil.copytree(folder_run[1], tmp_path / "moved")
    weights = hashlib.sha256((tmp_path / "moved" / "model.safetensors").read_bytes()).hexdigest()
    assert last(tmp_path / "run").manifest.identity["encoder"]["weights"] == weights
    (ended,) = train(tmp_path / "run", *_of_folder(tmp_path / "moved"), "training.steps=2")
    assert ended.status == 0 and "resume after step 1" in ended.out, ended.err
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2]


def test_changed_files_of_the_encoder_are_refused_on_every_rank(folder_run: tuple[Path, Path], tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "encoder"
    shutil.copytree(folder_run[0], run)
    shutil.copytree(folder_run[1], folder)
    words = (*_of_folder(folder), "training.steps=2")
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    (ended,) = train(run, *words)
    assert ended.status == 2 and "encoder.settings.image_mean [0.5, 0.5, 0.5], now [0.1, 0.2, 0.3]" in ended.err
    (folder / "preprocessor_config.json").unlink()
    stored = load_file(folder / "model.safetensors")
    save_file({name: 2 * value for name, value in stored.items()}, folder / "model.safetensors", {"format": "pt"})
    before = {name: content for name, content in contents(run).items() if name != ".lock"}
    ended_on_two = train(run, *words, "parallel.pp=2", ranks=2)
    assert [rank.status for rank in ended_on_two] == [2, 2]
    cause, cure = ended_on_two[0].err.splitlines()
    assert "other weights in model.vision.encoder.folder: sha256 " in cause and "put the first files back" in cure
    assert {name: content for name, content in contents(run).items() if name != ".lock"} == before


def test_a_run_of_before_goes_on_and_says_that_nothing_was_compared(
    folder_run: tuple[Path, Path], tmp_path: Path
) -> None:
    run, folder = tmp_path / "run", folder_run[1]
    shutil.copytree(folder_run[0], run)
    identity, manifest = json.loads((run / "identity.json").read_text()), last(run).manifest
    assert identity.pop("encoder") == manifest.identity.pop("encoder")
    (run / "identity.json").write_text(json.dumps(identity))
    (run / "SHA256SUMS").unlink()
    manifest.save(last(run).folder)
    (ended,) = train(run, *_of_folder(folder), "training.steps=2")
    assert ended.status == 0, ended.err
    assert f"nothing says whether {folder} has the ones it began with" in ended.out
    assert "resume after step 1" in ended.out
