"""Contents and names are on the disk before what relies on them: files first, then their folder, then the manifest."""

import os
from pathlib import Path

import pytest

from gpt4moe.data.folder import new_source
from gpt4moe.data.manifest import SourceManifest, write_json
from gpt4moe.durable import sync_files, sync_folder


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced and renamed, in order."""
    found: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: (found.append(f"sync {os.readlink(f'/proc/self/fd/{handle}')}"), fsync(handle))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (found.append(f"rename {b}"), replace(a, b)))
    return found


def test_files_come_before_their_folder(tmp_path: Path, events: list[str]) -> None:
    for name in ("b", "a"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder").mkdir()
    sync_files(tmp_path)
    sync_folder(tmp_path / "folder")
    assert events == [f"sync {tmp_path}/a", f"sync {tmp_path}/b", f"sync {tmp_path}", f"sync {tmp_path}/folder"]


def test_json_is_on_the_disk_before_it_has_its_name(tmp_path: Path, events: list[str]) -> None:
    write_json(tmp_path / "a.json", {})
    assert events[0].startswith(f"sync {tmp_path}/a.json.") and events[0].endswith(".tmp")
    assert events[1:] == [f"rename {tmp_path}/a.json", f"sync {tmp_path}"]


def test_a_source_is_on_the_disk_before_it_is_moved_in_place(tmp_path: Path, events: list[str]) -> None:
    with new_source(tmp_path / "a") as new:
        (new / "train-00000.bin").write_bytes(b"1")
        SourceManifest(tokenizer_sha256="", licence="", description="", train=(), valid=()).write(new)
    moved = events.index(f"rename {tmp_path}/a")
    assert f"sync {new}/train-00000.bin" in events[:moved] and f"sync {new}/manifest.json" in events[:moved]
    assert events[moved + 1 :] == [f"sync {tmp_path}"]
