"""Contents and names are on the disk before what relies on them: files first, then their folder, then the manifest."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from gpt4moe.convert.publish import Draft
from gpt4moe.convert.safetensors_file import NewTensor
from gpt4moe.data import in_place
from gpt4moe.data.catalogue import Catalogue
from gpt4moe.data.folder import new_source
from gpt4moe.data.manifest import SPLITS, SourceManifest, write_json
from gpt4moe.data.tokenizer import train_tokenizer
from gpt4moe.durable import sync_files, sync_folder
from gpt4moe.errors import DataError
from tools.tokenize_corpus import main as tokenize


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


def test_what_a_kill_leaves_of_a_source_may_be_removed_by_those_who_may_remove_its_folder(tmp_path: Path) -> None:
    """A group's folder, by umask 002; on NFS that trusts no root, nobody else could remove a folder of mode 0700."""
    before = os.umask(0o002)
    try:
        with pytest.raises(ZeroDivisionError), new_source(tmp_path / "group" / "a") as new:
            assert {oct(folder.stat().st_mode & 0o777) for folder in (new, *new.parents[:2])} == {"0o775"}
            assert in_place._LEFT.fullmatch(new.parent.name)
            raise ZeroDivisionError
    finally:
        os.umask(before)
    assert not (tmp_path / "group").exists()


def test_a_source_of_text_is_on_the_disk_before_what_says_that_it_is_finished(
    tmp_path: Path, events: list[str]
) -> None:
    texts = [f"document {i} of other things" for i in range(100)]
    train_tokenizer(texts, vocab_size=300).backend.save(str(tmp_path / "t.json"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out, work = tmp_path / "out", tmp_path / "out" / ".a.work"
    given = [f"--out={out}", f"--tokenizer={tmp_path}/t.json", f"--source=a={tmp_path}/a.jsonl", "--deduplicate"]
    assert tokenize([*given, "--held-out=0.2"]) == 0
    piece, shard = events.index(f"rename {work}/piece-000000.json"), f"rename {work}/shard-train-00000.json"
    for suffix in (*(f"{s}.{kind}" for s in SPLITS for kind in ("tokens", "lengths")), "keys", "splits", "sizes"):
        assert f"sync {work}/piece-000000.{suffix}" in events[:piece]
    assert f"sync {work}/piece-000000.counts" in events[:piece]
    assert f"sync {work}" in events[:piece]
    for suffix in ("bin", "sums", "idx"):
        assert f"sync {work}/new/train-00000.{suffix}" in events[: events.index(shard)]
    assert events[: events.index(shard)].index(f"sync {work}/new")
    for name, part in (("input-000000.sha256", "input-000000.part"), ("stays", "stays.part")):
        assert events[events.index(f"rename {work}/{name}") - 1] == f"sync {work}/{part}"


def test_a_source_that_cannot_be_moved_in_place_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(text: str) -> None:
        with new_source(tmp_path / "a") as new:
            SourceManifest(tokenizer_sha256="", licence=text, description="", train=(), valid=()).write(new)
            if text == "new":
                replace = os.replace
                monkeypatch.setattr(in_place, "exchange", lambda one, other: False)
                monkeypatch.setattr(os, "replace", lambda a, b: replace("/nowhere" if a == new else a, b))

    write("older")
    with pytest.raises(FileNotFoundError):
        write("new")
    assert SourceManifest.read(tmp_path / "a").licence == "older"


@pytest.mark.parametrize("can_swap", [True, False])
def test_a_kill_amid_the_replacement_of_a_source_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_swap: bool
) -> None:
    """Killed as soon as the older source is not in its place."""
    texts = [f"document {i} of other things" for i in range(60)]
    train_tokenizer(texts, vocab_size=300).backend.save(str(tmp_path / "t.json"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "out"
    given = [f"--out={out}", f"--tokenizer={tmp_path}/t.json", f"--source=a={tmp_path}/a.jsonl", "--held-out=0.2"]
    assert tokenize(given) == 0
    swap, replace = in_place.exchange, os.replace

    def killed(done: object) -> None:
        if not (out / "a").exists() or done:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda a, b: killed(replace(a, b)))
        patched.setattr(in_place, "exchange", lambda a, b: bool(can_swap and (killed(swap(a, b)) or True)))
        if (child := os.fork()) == 0:
            try:
                tokenize([*given, "--licence=a=MIT"])
            finally:  # an error must not go on with the tests in this process
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (out / "a").exists() == can_swap
    if can_swap:
        assert Catalogue.open([out]).sources["a"].manifest.licence == "MIT"
    else:
        with pytest.raises(DataError, match=r"Source a of .* is not in its place"):
            Catalogue.open([out])
    assert tokenize([*given, "--licence=a=MIT"]) == 0
    Catalogue.open([out]).require_whole()
    assert Catalogue.open([out]).sources["a"].manifest.licence == "MIT"
    assert sorted(path.name for path in out.iterdir()) == ["a", "manifest.json", "tokenizer.json"]


def test_a_source_that_is_a_link_is_replaced_and_its_folder_stays(tmp_path: Path) -> None:
    texts = [f"document {i} of other things" for i in range(60)]
    train_tokenizer(texts, vocab_size=300).backend.save(str(tmp_path / "t.json"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    given = [f"--out={out}", f"--tokenizer={tmp_path}/t.json", f"--source=a={tmp_path}/a.jsonl", "--held-out=0.2"]
    assert tokenize(given) == 0
    (out / "a").rename(elsewhere)
    (out / "a").symlink_to(elsewhere)
    assert tokenize([*given, "--licence=a=MIT"]) == 0
    assert [SourceManifest.read(folder).licence for folder in (out / "a", elsewhere)] == ["MIT", "unknown"]
    assert sorted(path.name for path in out.iterdir()) == ["a", "manifest.json", "tokenizer.json"]


def test_what_another_tool_left_beside_its_source_is_put_in_place_by_the_next(tmp_path: Path) -> None:
    def write(where: Path, text: str) -> None:
        where.mkdir(parents=True)
        SourceManifest(tokenizer_sha256="", licence=text, description="", train=(), valid=()).write(where)

    left = tmp_path / ".a-12345678"
    write(left / "old", "older")
    (left / "new").mkdir()  # no manifest: not whole
    write(tmp_path / ".b.c-87654321" / "old", "of another")
    assert in_place.unfinished_moves(tmp_path) == {"a": left, "b.c": tmp_path / ".b.c-87654321"}
    with pytest.raises(ZeroDivisionError), new_source(tmp_path / "a"):
        raise ZeroDivisionError
    assert SourceManifest.read(tmp_path / "a").licence == "older"
    assert set(in_place.unfinished_moves(tmp_path)) == {"b.c"}


def test_a_finished_file_of_a_conversion_is_noted_on_the_disk_before_the_note_has_its_name(
    tmp_path: Path, events: list[str]
) -> None:
    tensor = NewTensor("a", (2,), lambda take: iter([np.zeros(2, dtype=np.float32)]))
    Draft(tmp_path).tensors("x.safetensors", [tensor], dtype="F32", metadata={}, advance=lambda amount: None)
    assert events == [f"sync {tmp_path}/x.safetensors", f"sync {tmp_path}/x.safetensors.tmp",
                      f"rename {tmp_path}/x.safetensors.done.json"]  # fmt: skip
