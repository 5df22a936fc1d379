"""The manifest is the commit: whole or absent, and any change of it is noticed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt4moe.checkpoint.manifest import NAME, Manifest
from gpt4moe.checkpoint.storage import FileEntry, block_bytes_for
from gpt4moe.config.typed import sealed
from gpt4moe.errors import CheckpointError
from tests.checkpoint.builders import manifest


def entry(name: str = "rank-00000.safetensors", blocks: int = 2) -> FileEntry:
    return FileEntry(
        name=name, size=100, header_bytes=40, header_hash="f" * 16, block_bytes=30, block_hashes=["0" * 16] * blocks
    )


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = manifest(files=[entry()])
    saved.save(tmp_path)
    assert Manifest.load(tmp_path) == saved
    assert os.listdir(tmp_path) == [NAME]


def test_a_folder_without_one_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("key", ["step", "consumed_per_source", "files", "config", "identity"])
def test_any_changed_value_is_noticed(tmp_path: Path, key: str) -> None:
    manifest(files=[entry()]).save(tmp_path)
    body = json.loads((tmp_path / NAME).read_text())
    changed: dict[str, Any] = body | {key: {"step": 4}.get(key, {})}
    (tmp_path / NAME).write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="sha256 differs"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", "\0"])
def test_rubbish_is_damaged_not_a_traceback(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        Manifest.load(tmp_path)


def test_a_bit_that_changes_no_value_is_noticed_too(tmp_path: Path) -> None:
    manifest(config={"lr": 1e-5}).save(tmp_path)
    text = (tmp_path / NAME).read_text()
    assert "1e-05" in text
    (tmp_path / NAME).write_text(text.replace("1e-05", "1E-05"))
    with pytest.raises(CheckpointError, match="sha256 differs"):
        Manifest.load(tmp_path)


def test_it_is_one_json_object(tmp_path: Path) -> None:
    manifest().save(tmp_path)
    body = json.loads((tmp_path / NAME).read_text())
    assert next(iter(body)) == "sha256" and body["step"] == 3


def test_a_kill_before_the_rename_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(source: Path, target: Path) -> None:
        raise InterruptedError

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(InterruptedError):
        manifest().save(tmp_path)
    assert not (tmp_path / NAME).exists()


def test_it_stays_small_at_1_8_trillion_parameters(tmp_path: Path) -> None:
    ranks, size = 3072, 1_800_000_000_000 * 12 // 3072
    blocks = -(-size // block_bytes_for(size))
    manifest(files=[entry(f"rank-{rank:05d}.safetensors", blocks) for rank in range(ranks)]).save(tmp_path)
    assert (tmp_path / NAME).stat().st_size < 10 * 2**20


@pytest.mark.parametrize(
    ("forged", "cause"),
    [
        (lambda body: body | {"colour": "red"}, "'colour' is an unknown key"),
        (lambda body: {key: value for key, value in body.items() if key != "layout"}, "layout is missing"),
        (lambda body: body | {"files": [{"name": "x"}]}, r"files\[0\].size is missing"),
        (lambda body: body | {"step": "x"}, "step is 'x', not a whole number from 0"),
        (lambda body: body | {"step": True}, "step is True, not a whole number from 0"),
        (lambda body: body | {"config": []}, r"config is \[\], not an object"),
        (lambda body: body | {"config": {"optimizer": 3}}, "config.optimizer is not an object"),
        (lambda body: body | {"files": None}, "files is None, not a list"),
        (lambda body: body | {"files": body["files"] * 2}, "files has a name twice"),
        (lambda body: body | {"files": [body["files"][0] | {"header_bytes": 2**62}]}, "a header of"),
        (lambda body: body | {"files": [body["files"][0] | {"block_bytes": 0}]}, "or no block"),
        (
            lambda body: body | {"files": [body["files"][0] | {"block_hashes": [1]}]},
            r"block_hashes\[0\] is 1, not a text",
        ),
        (lambda body: body | {"files": [body["files"][0] | {"name": "\ud800"}]}, "name is .*, not a text"),
        (lambda body: body | {"base": {"folder": "x"}}, "base has other keys"),
        (lambda body: body | {"passed_over": [[1]]}, r"passed_over has \[1\]"),
        (lambda body: body | {"passed_over": [[5, 936], [3, 7]]}, r"passed_over has \[3, 7\]"),
        (lambda body: body | {"passed_over": [[5, 0]]}, r"passed_over has \[5, 0\]"),
        (lambda body: body | {"format": 2}, "another format"),
        (lambda body: {key: value for key, value in body.items() if key != "format"}, "another format"),
        (
            lambda body: body | {"files": [body["files"][0] | {"name": "../x"}]},
            r"files\[0\].name: '../x' leads out of the folder",
        ),
    ],
)
def test_a_right_seal_on_wrong_content_is_refused(
    forged: Callable[[dict[str, Any]], dict[str, Any]], cause: str, tmp_path: Path
) -> None:
    manifest(files=[entry()]).save(tmp_path)
    body = json.loads((tmp_path / NAME).read_text())
    del body["sha256"]
    (tmp_path / NAME).write_text(sealed(json.dumps(forged(body))))
    with pytest.raises(CheckpointError, match=cause):
        Manifest.load(tmp_path)


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(CheckpointError, match=r"cannot be read on .*: Is a directory"):
        Manifest.load(tmp_path)
