"""Adapters from a run to a whole checkpoint, and to a folder that PEFT loads: the same logits everywhere."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.reader import CheckpointReader
from gpt4moe.checkpoint.retention import find_checkpoint
from gpt4moe.config.checksums import file_sha256
from gpt4moe.config.load import load_run_config
from gpt4moe.convert.adapters import MergedWeights, merge, open_checkpoint
from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.convert.inference_layout import to_inference_layout
from gpt4moe.convert.model_files import kept_folder
from gpt4moe.convert.peft_folder import to_peft
from gpt4moe.convert.verify import require_runnable, verify
from gpt4moe.errors import CheckpointError, ConversionError
from gpt4moe.parallel.environment import Environment
from tests.convert.conftest import SHAPE
from tests.spawn import run_ranks
from tests.training.command import metrics, train

LORA = ("stage.lora.rank=4", "optimizer.lr=0.01", "run.seed=5", "tracking.count_bytes=false")
IDS = [[(7 * place) % 256 for place in range(24)]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, adapters trained on it in four steps, the same in two launches on two layouts and engines, and merged."""
    root = tmp_path_factory.mktemp("adapters")
    (ended,) = train(root / "base", *SHAPE)
    assert ended.status == 0, ended.err
    lora = (*SHAPE, *LORA, f"checkpoint.load={root / 'base'}")
    for ended in (
        *train(root / "adapted", *lora, "training.steps=4"),
        *train(root / "twice", *lora, "training.steps=2", "parallel.tp=2", "parallel.ep=2", ranks=2),
        *train(root / "twice", *lora, "training.steps=4", "engine=deepspeed"),
    ):
        assert ended.status == 0, ended.err
        assert "checkpoint" in ended.out or not ended.out
    merge(root / "adapted", root / "merged")
    for name in ("base", "merged"):
        to_huggingface(root / name, root / f"{name}-hf", dtype="fp32")
    return {path.name: path for path in root.iterdir()}


def test_a_checkpoint_holds_adapters_alone_and_any_layout_goes_on_from_it(folders: dict[str, Path]) -> None:
    index = CheckpointReader(find_checkpoint(folders["adapted"]))
    assert {name.partition("/")[0] for name in index.shapes} == {"weight", "exp_avg", "exp_avg_sq"}
    assert all(name.endswith(("lora_a", "lora_b")) for name in index.shapes)
    assert len(index.shapes) == 3 * 2 * 2 * 4  # states, a and b, layers, matrices
    assert list(index.problems()) == []
    one, two = metrics(folders["adapted"]), metrics(folders["twice"])
    np.testing.assert_allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=2e-6)
    assert two[0]["loss"] != two[3]["loss"]


def test_merged_weights_are_those_of_the_base_and_what_the_adapters_add(folders: dict[str, Path]) -> None:
    base, adapters, merged = (
        CheckpointReader(find_checkpoint(folders[name])) for name in ("base", "adapted", "merged")
    )
    assert list(merged.problems()) == []
    for layer in range(2):
        name = f"decoder.layers.{layer}.mlp.experts.gate_up"
        a, b = (adapters.tensor(f"weight/{name}_lora_{part}") for part in "ab")
        added = 16 / 4 * (b.flatten(1, 2) @ a).view(4, 2, 32, 32)
        assert added.flatten(1).any(dim=1).all(), "every expert must have moved"
        assert (merged.tensor(f"weight/{name}") - base.tensor(f"weight/{name}")).allclose(added, atol=1e-6)
        router = f"weight/decoder.layers.{layer}.mlp.router.weight"
        assert merged.tensor(router).equal(base.tensor(router))


def test_every_conversion_takes_adapters_merged(folders: dict[str, Path], tmp_path: Path) -> None:
    to_huggingface(folders["adapted"], tmp_path / "direct", dtype="fp32")
    assert not verify(tmp_path / "direct", folders["merged-hf"])["different"]


def test_a_merged_checkpoint_begins_a_run_and_adapters_do_not(folders: dict[str, Path], tmp_path: Path) -> None:
    still = (*SHAPE, "training.steps=1", "run.seed=5")
    (ended,) = train(tmp_path / "x", *still, f"checkpoint.load={folders['merged']}")
    assert ended.status == 0, ended.err
    (ended,) = train(tmp_path / "y", *still, f"checkpoint.load={folders['adapted']}")
    assert ended.status == 2
    assert "holds adapters alone" in ended.err and "convert_checkpoint.py merge" in ended.err
    (ended,) = train(tmp_path / "z", *still, *LORA)
    assert ended.status == 2 and "adapters need the weights of a base" in ended.err


def test_a_base_that_changed_or_is_gone_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["adapted"], tmp_path / "adapted")
    manifest = find_checkpoint(tmp_path / "adapted") / "manifest.json"
    lost = Manifest.load(manifest.parent)
    assert lost.base is not None
    lost.base["folder"] = str(tmp_path / "nowhere")
    lost.save(manifest.parent)
    with pytest.raises(CheckpointError, match="is gone"):
        merge(tmp_path / "adapted", tmp_path / "out")
    with pytest.raises(CheckpointError, match="is not the base of these adapters"):
        merge(tmp_path / "adapted", tmp_path / "out", base=folders["twice"])
    merge(tmp_path / "adapted", tmp_path / "out", base=folders["base"])
    to_huggingface(tmp_path / "adapted", tmp_path / "hf", dtype="fp32", base=folders["base"])
    assert not verify(tmp_path / "adapted", tmp_path / "hf", base=folders["base"])["different"]
    to_inference_layout(tmp_path / "adapted", tmp_path / "grid", tp=1, pp=1, dtype="fp32", base=folders["base"])
    assert not verify(tmp_path / "grid", tmp_path / "hf")["different"]
    with pytest.raises(CheckpointError, match="holds adapters alone"):
        require_runnable(tmp_path / "adapted")
    with pytest.raises(ConversionError, match="not one of adapters"):
        merge(folders["base"], tmp_path / "other")


@pytest.mark.parametrize(("trained_with", "is_taken"), [("itself", True), ("none", True), ("another", False)])
def test_adapters_take_the_tokenizer_of_their_base_if_it_is_theirs(
    tmp_path: Path, trained_with: str, is_taken: bool
) -> None:
    kept = tmp_path / "tokenizer"
    kept.mkdir()
    (kept / "tokenizer.json").write_text("{}")
    identity = {"tokenizer": file_sha256(kept / "tokenizer.json") if trained_with == "itself" else trained_with}
    adapters = SimpleNamespace(base=object(), identity=identity)
    run = load_run_config(["+experiment=tiny", "run.name=x", "data=mock"])
    assert kept_folder(tmp_path, adapters, run) == (kept if is_taken else None)


def _peft_logits(environment: Environment, base: Path, adapter: Path | None) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def test_peft_loads_the_folder_and_computes_the_merged_model_s_logits(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="no peft here")
    to_peft(folders["adapted"], tmp_path / "peft", model=str(folders["base-hf"]))
    (got,) = run_ranks(1, _peft_logits, folders["base-hf"], tmp_path / "peft")
    (want,) = run_ranks(1, _peft_logits, folders["merged-hf"], None)
    (base,) = run_ranks(1, _peft_logits, folders["base-hf"], None)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(base - want).max() > 0.1


def test_a_peft_folder_names_each_parameter_of_the_export(folders: dict[str, Path], tmp_path: Path) -> None:
    to_peft(folders["adapted"], tmp_path / "peft", model="us/base")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 16)
    modules = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(2) for part in "qkvo"]
    assert sorted(config["target_modules"]) == sorted(modules)
    assert config["target_parameters"] == [
        f"model.layers.{layer}.mlp.experts.{part}_proj" for layer in range(2) for part in ("gate_up", "down")
    ]


@pytest.mark.parametrize("model", ["nosuch", "./no/such", "runs"])
def test_a_base_that_peft_cannot_find_is_refused(
    model: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConversionError, match=f"--model {model} (is no folder|has no config.json)") as error:
        to_peft(folders["adapted"], tmp_path / "peft", model=model)
    assert error.value.exit_code == 2 and "to-hf BASE FOLDER" in error.value.cure
    assert not (tmp_path / "peft").exists()


def test_an_export_is_of_the_adapters_run_and_goes_on_with_no_other_s_files(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    to_huggingface(folders["adapted"], tmp_path / "out", dtype="fp32")
    assert "adapted" in (tmp_path / "out" / "README.md").read_text()
    of = {name: open_checkpoint(folders[name]).block_hashes for name in ("base", "adapted", "twice")}
    assert len({str(hashes) for hashes in of.values()}) == 3
    assert open_checkpoint(folders["adapted"]).manifest.step == 4


def test_adapters_begin_no_run_of_another_scale_or_model(folders: dict[str, Path], tmp_path: Path) -> None:
    begin = (*SHAPE, *LORA, f"checkpoint.load={folders['adapted']}", "training.steps=1")
    (ended,) = train(tmp_path / "a", *begin, "stage.lora.alpha=64")
    assert ended.status == 2 and "Set stage.lora.alpha=16" in ended.err
    (ended,) = train(tmp_path / "b", *begin, "model.qk_norm=true")
    assert ended.status == 2 and "lacks 4 tensors that the model needs" in ended.err


def test_a_piece_that_is_missing_is_found(folders: dict[str, Path]) -> None:
    source = MergedWeights(folders["adapted"])
    name = "weight/decoder.layers.0.mlp.experts.gate_up_lora_a"
    source.adapters.pieces[name] = source.adapters.pieces[name][1:]
    with pytest.raises(ConversionError, match="gate_up_lora_a"):
        source.pair("decoder.layers.0.mlp.experts.gate_up")
