"""A downloaded folder is somebody else's: what it can't bring in, and that real downloads convert as they lie."""

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.numpy import load_file, save_file

from gpt4moe.checkpoint.inspection import verification
from gpt4moe.convert.from_huggingface import from_huggingface
from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.convert.verify import verify
from gpt4moe.data.tokenizer import train_tokenizer
from gpt4moe.errors import ConversionError, Gpt4MoeError


@pytest.fixture
def download(mixtral: Path, tmp_path: Path) -> Path:
    """A folder of its own for a test to damage, with a tokenizer, its weights in one file with an index."""
    folder = shutil.copytree(mixtral, tmp_path / "hf")
    lines = [f"word{n} and {n % 7}\n" for n in range(200)]
    train_tokenizer(lines, vocab_size=257).backend.save(str(folder / "tokenizer.json"))
    _index(folder, "model.safetensors")
    return folder


def _index(folder: Path, name: str) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _refused(folder: Path, said: str) -> None:
    out = folder.parent / "out"
    before = sorted(folder.parent.iterdir())
    with pytest.raises(ConversionError, match=said):
        from_huggingface(folder, out)
    assert sorted(folder.parent.iterdir()) == before


def test_a_snapshot_of_the_hubs_cache_converts_as_it_lies(download: Path, tmp_path: Path) -> None:
    """Every file of a snapshot is a link to ../../blobs/HASH."""
    model = tmp_path / "models--a--b"
    snapshot, blobs = model / "snapshots" / "0f3a", model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(download.iterdir())):
        shutil.copyfile(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    answer = from_huggingface(snapshot, tmp_path / "ours")
    kept = tmp_path / "ours" / "tokenizer" / "tokenizer.json"
    assert kept.read_bytes() == (download / "tokenizer.json").read_bytes() and not kept.is_symlink()
    assert answer["tensors"] and not verify(snapshot, tmp_path / "ours")["different"]


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model", "config.json", "generation_config.json",
             "model.safetensors.index.json"],
)  # fmt: skip
def test_a_link_out_of_the_folder_is_refused(download: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("key")
    (download / name).unlink(missing_ok=True)
    (download / name).symlink_to(tmp_path / "secret")
    _refused(download, f"{name} is a link to .*secret, out of its folder")


@pytest.mark.parametrize("what", ["file", "folder", "changed", "no tokenizer", "no settings"])
def test_a_checkpoint_of_somebody_else_brings_no_file_and_no_damage_by_its_tokenizer(
    download: Path, tmp_path: Path, what: str
) -> None:
    from_huggingface(download, tmp_path / "ours")
    kept, secret = tmp_path / "ours" / "tokenizer", tmp_path / "secret"
    secret.mkdir()
    (secret / "id").write_text("key")
    if what == "file":
        (kept / "id").symlink_to(secret / "id")
    elif what == "folder":
        shutil.rmtree(kept)
        kept.symlink_to(secret)
    elif what == "changed":
        text = (kept / "tokenizer.json").read_text()
        (kept / "tokenizer.json").write_text(text.replace("word", "wort", 1))
        assert any("tokenizer.json is not what was written" in it for it in verification(tmp_path / "ours")["problems"])
    else:
        (kept / "SHA256SUMS").unlink()
        (kept / ("tokenizer.json" if what == "no tokenizer" else "generation_config.json")).write_text("[" * 50_000)
    said = {"file": "id is a link to .*secret/id, out of its", "folder": "tokenizer is a link to .*secret, out of its",
            "changed": "tokenizer.json is not what was written", "no tokenizer": "tokenizer.json is no tokenizer",
            "no settings": "tokenizer cannot be read"}  # fmt: skip
    with pytest.raises(ConversionError, match=said[what]):
        to_huggingface(tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_of_an_export_that_changed_is_found_by_its_sum(download: Path, tmp_path: Path) -> None:
    from_huggingface(download, tmp_path / "ours")
    out = tmp_path / "exported"
    to_huggingface(tmp_path / "ours", out)
    listed = {line.split("  ")[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in out.iterdir()} - {"README.md", "SHA256SUMS"}
    assert verify(out, tmp_path / "ours")["changed_files"] == []
    text = (out / "generation_config.json").read_text()
    (out / "generation_config.json").write_text(text + " ")
    (changed,) = verify(tmp_path / "ours", out)["changed_files"]
    assert changed.startswith(f"{out / 'generation_config.json'} is not what was written")
    _refused(out, "generation_config.json is not what was written")


@pytest.mark.parametrize("text", ["", "no sum\n", f"{'0' * 64}  ../secret\n", f"{'0' * 64}  \x1b[2J\n"])
def test_sums_of_a_copy_that_a_full_disk_cut_or_of_somebody_elses_making_are_refused(download: Path, text: str) -> None:
    """The last one's name would clear the terminal that it is printed on."""
    (download / "SHA256SUMS").write_text(text)
    _refused(download, "SHA256SUMS is damaged")


def test_the_disk_is_looked_at_before_the_source_is_hashed(
    download: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Terabytes take an hour."""
    (download / "SHA256SUMS").write_text("no sum\n")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=7))
    with pytest.raises(ConversionError, match="free, the conversion writes"):
        from_huggingface(download, tmp_path / "ours")
    assert not [*tmp_path.glob("ours*")]


def test_the_kept_tokenizer_is_on_the_disk_before_the_folder_has_its_name(
    download: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power failure it would be empty in a checkpoint that is whole by its manifest."""
    found, fsync, rename = list[str](), os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda it: (found.append(os.readlink(f"/proc/self/fd/{it}")), fsync(it)))
    monkeypatch.setattr(os, "rename", lambda a, b: (found.append(str(b)), rename(a, b)))
    from_huggingface(download, tmp_path / "ours")
    synced = found[: found.index(str(tmp_path / "ours"))]
    kept = {path.name for path in (tmp_path / "ours" / "tokenizer").iterdir()}
    assert "tokenizer.json" in kept and kept <= {Path(path).name for path in synced}


def test_large_files_that_older_downloads_linked_convert_as_they_lie(download: Path, tmp_path: Path) -> None:
    """`--local-dir` before huggingface_hub 0.23: NAME -> ~/.cache/huggingface/hub/models--a--b/blobs/HASH."""
    blobs = tmp_path / "cache" / "hub" / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for name in ("tokenizer.json", "model.safetensors"):
        (download / name).rename(blobs / name)
        (download / name).symlink_to(blobs / name)
    assert from_huggingface(download, tmp_path / "ours")["tensors"]


def test_weights_may_be_a_link_to_anywhere_and_are_read_as_numbers_alone(download: Path, tmp_path: Path) -> None:
    weights = download / "model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    assert from_huggingface(download, tmp_path / "ours")["tensors"]
    shutil.rmtree(tmp_path / "ours")
    (tmp_path / "secret").write_text("key" * 99)
    weights.unlink()
    weights.symlink_to(tmp_path / "secret")
    _refused(download, "no safetensors file")


@pytest.mark.parametrize("name", ["../hf/model.safetensors", "/etc/passwd", "..", "", "x/y.safetensors"])
def test_an_index_that_names_a_file_elsewhere_is_refused(download: Path, name: str) -> None:
    _index(download, name)
    _refused(download, "leads out of the folder")


def test_an_index_of_other_files_is_refused(download: Path) -> None:
    tensors = load_file(download / "model.safetensors")
    save_file({"lm_head.weight": tensors.pop("lm_head.weight")}, download / "b.safetensors", metadata={"format": "pt"})
    save_file(tensors, download / "model.safetensors", metadata={"format": "pt"})
    names = dict.fromkeys([*tensors, "lm_head.weight"], "model.safetensors") | {"model.norm.weight": "b.safetensors"}
    (download / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    _refused(download, "says that .* is in .*: it is in ")


def test_an_index_may_list_tensors_that_no_file_has_and_no_model_needs(download: Path, tmp_path: Path) -> None:
    index = json.loads((download / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = "model.safetensors"
    (download / "model.safetensors.index.json").write_text(json.dumps(index))
    assert from_huggingface(download, tmp_path / "ours")["tensors"]
    tensors = load_file(download / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, download / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(tmp_path / "ours")
    _refused(download, "has no tensor model.norm.weight")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_with_its_tensor(download: Path, value: float) -> None:
    tensors = load_file(download / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"].reshape(-1)[-1] = value
    save_file(tensors, download / "model.safetensors", metadata={"format": "pt"})
    _refused(download, "layers.1.* has a value that is not finite .model.safetensors.")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is above"), ({"num_local_experts": 10**9}, "."),
        ({"vocab_size": 2**60}, "config.json says"), ({"rms_norm_eps": -1.0}, "norm_epsilon"),
        ({"eos_token_id": 10**9}, "eos_token_id=1000000000 .* is no token"), ({"bos_token_id": -7}, "bos_token_id=-7"),
    ],
)  # fmt: skip
def test_sizes_that_no_model_has_end_at_once(download: Path, changes: dict[str, object], said: str) -> None:
    config = json.loads((download / "config.json").read_text())
    (download / "config.json").write_text(json.dumps(config | changes))
    (download / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(Gpt4MoeError, match=said):
        from_huggingface(download, download.parent / "out")


def test_a_padding_token_outside_the_vocabulary_is_left_out_with_a_note(download: Path, tmp_path: Path) -> None:
    config = json.loads((download / "config.json").read_text())
    (download / "config.json").write_text(json.dumps(config | {"pad_token_id": config["vocab_size"]}))
    (download / "generation_config.json").unlink(missing_ok=True)
    answer = from_huggingface(download, tmp_path / "ours")
    assert any("pad_token_id=" in note for note in answer["notes"])
    kept = tmp_path / "ours" / "tokenizer" / "generation_config.json"
    assert json.loads(kept.read_text())["pad_token_id"] is None


def test_a_damaged_tokenizer_is_refused(download: Path) -> None:
    whole = (download / "tokenizer.json").read_bytes()
    (download / "tokenizer.json").write_bytes(whole[:-9])
    _refused(download, "tokenizer.json is no tokenizer")


def test_a_folder_of_pickles_alone_reaches_no_unpickler(download: Path) -> None:
    (download / "model.safetensors").rename(download / "pytorch_model.bin")
    (download / "model.safetensors.index.json").unlink()
    _refused(download, "lacks safetensors files")
