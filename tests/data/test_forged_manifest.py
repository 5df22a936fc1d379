"""A data manifest of another content is refused by the key that is wrong, whoever wrote it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt4moe.data.catalogue import Catalogue
from gpt4moe.errors import DataError


def _shard(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda raw: raw["train"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_shard(sums="../../secret"), "leads out of the folder"),
        (_shard(dtype="object"), "dtype is object, not one of"),
        (_shard(tokens=-1), r"train\[0\].tokens is -1"), (_shard(tokens=2**70), "not a whole number"),
        (_shard(file=None), "file is None, not a text"), (_shard(documents="3"), "documents is '3'"),
        (_shard(colour=1), "'colour' is an unknown key"), (lambda raw: raw.pop("valid"), "valid is missing"),
        (lambda raw: raw.update(train={}), r"train is {}, not a list"), (lambda raw: raw.update(text=[1]), "text is"),
        (lambda raw: raw.update(masks={"train": []}), "a split is none of"),
        (lambda raw: raw.update(images=5), "images is 5"),
        (lambda raw: raw.update(tokenizer_sha256=5), "tokenizer_sha256 is 5, not a text"),
    ],
)  # fmt: skip
def test_a_source_s_manifest(
    change: Callable[[dict[str, Any]], object], said: str, data_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(data_folder, tmp_path / "data")
    raw = json.loads((folder / "alpha" / "manifest.json").read_text())
    del raw["sha256"]  # as who meant it would
    change(raw)
    (folder / "alpha" / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match=said):
        Catalogue.open([folder])


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tokenizer", "../../etc/passwd", "leads out of the folder"), ("tokenizer", 5, "tokenizer is 5, not a text"),
        ("vocab_size", "x", "vocab_size is 'x'"), ("eos_id", None, "eos_id is None"), ("colour", 1, "unknown key"),
    ],
)  # fmt: skip
def test_a_folder_s_manifest(key: str, value: object, said: str, data_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(data_folder, tmp_path / "data")
    raw = json.loads((folder / "manifest.json").read_text()) | {key: value}
    del raw["sha256"]
    (folder / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match=said):
        Catalogue.open([folder])


@pytest.mark.parametrize(
    ("name", "pattern", "by"),
    [
        ("alpha/manifest.json", '("documents": )[0-9]+', r"\g<1>7"), ("alpha/manifest.json", "CC0-1.0", "CC0-1.1"),
        ("alpha/manifest.json", '("bin_sha256": ")(.)', r"\g<1>\g<2>\g<2>"),
        ("manifest.json", '("eos_id": )[0-9]+', r"\g<1>9"), ("manifest.json", '("sha256": ")(.)', r"\g<1>\g<2>\g<2>"),
    ],
)  # fmt: skip
def test_what_was_changed_since_it_was_written(
    name: str, pattern: str, by: str, data_folder: Path, tmp_path: Path
) -> None:
    """Values that are possible: what else would say so is another file, or nothing."""
    folder = shutil.copytree(data_folder, tmp_path / "data")
    text = (folder / name).read_text()
    changed = re.sub(pattern, by, text, count=1)
    assert changed != text
    (folder / name).write_text(changed)
    with pytest.raises(DataError, match="was changed since it was written: its sha256") as refusal:
        Catalogue.open([folder])
    assert "take the sha256 out" in refusal.value.cure


@pytest.mark.parametrize(("indent", "ascii_only"), [(2, False), (None, True)])
def test_a_manifest_that_another_program_wrote_anew_says_how_to_keep_it(
    indent: int | None, ascii_only: bool, data_folder: Path, tmp_path: Path
) -> None:
    """Its sha256 stands elsewhere: that is no unknown key, for which the data would be made again."""
    folder = shutil.copytree(data_folder, tmp_path / "data")
    path = folder / "alpha" / "manifest.json"
    raw = json.loads(path.read_text()) | {"licence": "MIT"}
    path.write_text(json.dumps(raw, indent=indent, ensure_ascii=ascii_only, separators=(",", ":")))
    with pytest.raises(DataError, match="was changed since it was written: its sha256") as refusal:
        Catalogue.open([folder])
    assert "take the sha256 out" in refusal.value.cure
    del raw["sha256"]
    path.write_text(json.dumps(raw, indent=indent, ensure_ascii=ascii_only))
    assert Catalogue.open([folder]).sources["alpha"].manifest.licence == "MIT"


def test_manifests_of_before_there_was_a_seal_are_read(data_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(data_folder, tmp_path / "data")
    for path in folder.rglob("manifest.json"):
        raw = json.loads(path.read_text())
        assert next(iter(raw)) == "sha256" and raw.pop("sha256")
        path.write_text(json.dumps(raw, indent=1) + "\n")
    assert Catalogue.open([folder]).fingerprint() == Catalogue.open([data_folder]).fingerprint()
