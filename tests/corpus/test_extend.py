"""A source that grows gets new shards; the old ones, and the other sources, are not touched."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt4moe.corpus import build, extend
from gpt4moe.data.catalogue import Catalogue
from gpt4moe.data.lookup import all_shards, verify_shard
from gpt4moe.data.manifest import SourceManifest
from tests.corpus.conftest import TEXTS, tokens_of, write_lines
from tests.corpus.test_build import small

Make = Callable[..., int]
MADE = ("--held-out=0.1", "--deduplicate")


@pytest.fixture
def grown(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two sources of several shards, and b.jsonl: 100 new documents and 300 of a's, another white space."""
    small(monkeypatch, 3000, 4000)
    write_lines(tmp_path / "a.jsonl", TEXTS[:300])
    write_lines(tmp_path / "b.jsonl", [*TEXTS[300:350], *(f" {text}  " for text in TEXTS[:300]), *TEXTS[350:]])
    assert make(f"--source=a={tmp_path}/a.jsonl", f"--source=other={tmp_path}/a.jsonl", *MADE) == 0
    return tmp_path / "out"


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_new_shards_join_the_old_ones_and_duplicates_of_old_documents_are_removed(
    make: Make, grown: Path, tmp_path: Path
) -> None:
    before, other = stamps(grown / "a"), stamps(grown / "other")
    old = {split: tokens_of(grown / "a", split) for split in ("train", "valid")}
    count = {split: len(SourceManifest.read(grown / "a").shards(split)) for split in old}
    assert make(f"--extend=a={tmp_path}/b.jsonl", *MADE, "--processes=2") == 0
    assert stamps(grown / "other") == other
    now = stamps(grown / "a")
    assert {name: now[name] for name in before if name != "manifest.json"} == {
        name: stamp for name, stamp in before.items() if name != "manifest.json"
    }
    manifest = SourceManifest.read(grown / "a")
    assert [shard.file for shard in manifest.train] == [f"train-{i:05}" for i in range(len(manifest.train))]
    assert len(manifest.train) > count["train"] > 1
    # The tokens are those of all files at once, where no shard's end falls between two documents of one split.
    assert make(f"--source=all={tmp_path}/a.jsonl,{tmp_path}/b.jsonl", *MADE) == 0
    for split in old:
        assert tokens_of(grown / "a", split) == tokens_of(grown / "all", split)
        assert tokens_of(grown / "a", split).startswith(old[split])
    text, whole = manifest.text, SourceManifest.read(grown / "all").text
    assert text is not None and whole is not None
    for key in ("documents", "tokens", "bytes", "bytes_read", "removed", "inputs"):
        assert text[key] == whole[key]
    catalogue = Catalogue.open([grown])
    for source, shard in all_shards(catalogue):
        assert verify_shard(source, shard, 320, lambda amount: None) == []


def test_the_same_extension_is_made_once_and_a_second_one_joins(
    make: Make, grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(f"--extend=a={tmp_path}/b.jsonl", *MADE) == 0
    manifest = (grown / "a" / "manifest.json").read_bytes()
    assert make(f"--extend=a={tmp_path}/b.jsonl", *MADE) == 0
    assert "made already" in capsys.readouterr().err
    assert (grown / "a" / "manifest.json").read_bytes() == manifest
    write_lines(tmp_path / "c.jsonl", [TEXTS[399], "a document of the third file", TEXTS[0]])
    assert make(f"--extend=a={tmp_path}/c.jsonl", *MADE) == 0
    text = SourceManifest.read(grown / "a").text
    assert text is not None and sum(text["documents"].values()) == 401 and len(text["extensions"]) == 2


def test_a_kill_while_files_are_moved_leaves_the_older_source_and_the_command_goes_on(
    make: Make, grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = SourceManifest.read(grown / "a")
    with monkeypatch.context() as broken:
        moved: list[object] = []

        def replace(a: Path, b: Path) -> None:
            if Path(b).parent == grown / "a":
                moved.append(b)
                if len(moved) == 3:
                    raise KeyboardInterrupt
            os.rename(a, b)

        broken.setattr(extend.os, "replace", replace)
        assert make(f"--extend=a={tmp_path}/b.jsonl", *MADE) == 130
    assert SourceManifest.read(grown / "a") == before
    assert make(f"--extend=a={tmp_path}/b.jsonl", *MADE) == 0
    assert make(f"--source=all={tmp_path}/a.jsonl,{tmp_path}/b.jsonl", *MADE) == 0
    assert tokens_of(grown / "a") == tokens_of(grown / "all")


REFUSED = {
    "no such source": ("--extend=new={0}/b.jsonl", "There is no source"),
    "a file again": ("--extend=a={0}/a.jsonl", "already: its documents would be there twice"),
    "another option": ("--extend=a={0}/b.jsonl --held-out=0.2", "held_out=0.1, this command says 0.2"),
    "another licence": ("--extend=a={0}/b.jsonl --licence=a=MIT", "has the licence unknown, not MIT"),
    "both": ("--extend=a={0}/b.jsonl --source=a={0}/b.jsonl", "given twice"),
    "nothing new": ("--extend=a={0}/old.jsonl", "no document for train"),
}


def test_what_cannot_be_extended_is_refused_and_nothing_is_touched(
    make: Make, grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "old.jsonl", TEXTS[:20])
    before = stamps(grown / "a")
    for words, said in REFUSED.values():
        assert make(*MADE, *words.format(tmp_path).split()) == 2
        errors = capsys.readouterr().err
        assert said in errors, errors
        assert stamps(grown / "a") == before
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    assert make(f"--source=plain={tmp_path}/a.jsonl", "--held-out=0.1") == 0
    assert make(f"--extend=plain={tmp_path}/copy.jsonl", "--held-out=0.1") == 2
    assert f"{grown}/plain was made of already" in capsys.readouterr().err
    path = grown / "a" / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert make(f"--extend=a={tmp_path}/b.jsonl", *MADE) == 2
    assert "is damaged" in capsys.readouterr().err


def test_making_an_extended_source_anew_without_its_new_files_is_refused(
    make: Make, grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(f"--extend=a={tmp_path}/b.jsonl", *MADE) == 0
    before = stamps(grown / "a")
    assert make(f"--source=a={tmp_path}/a.jsonl", *MADE) == 2
    assert f"its documents of {tmp_path}/b.jsonl would be dropped" in capsys.readouterr().err
    assert stamps(grown / "a") == before
    assert make(f"--source=a={tmp_path}/a.jsonl,{tmp_path}/b.jsonl", *MADE) == 0


def test_every_extension_of_a_source_is_made_already(
    make: Make, grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "c.jsonl", ["a document of the third file", *(f"{text}!" for text in TEXTS[:20])])
    for name in "bc":
        assert make(f"--extend=a={tmp_path}/{name}.jsonl", *MADE) == 0
    before = stamps(grown / "a")
    for name in "bc":
        capsys.readouterr()
        assert make(f"--extend=a={tmp_path}/{name}.jsonl", *MADE) == 0
        assert "made already" in capsys.readouterr().err
    assert stamps(grown / "a") == before


def test_files_that_were_read_in_a_folder_are_not_read_again(
    make: Make, grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, text in enumerate(TEXTS[:40]):
        path = tmp_path / "code" / f"part{number % 2}" / f"{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    records = tmp_path / "records"
    records.mkdir()
    (records / "a.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    assert make(f"--source=code={tmp_path}/code", f"--source=lines={records}", "--held-out=0.2") == 0
    monkeypatch.setattr(build, "make_piece", None)  # refused before there is work
    before = stamps(grown / "code")
    assert make(f"--extend=code={tmp_path}/code/part1", "--held-out=0.2") == 0
    assert "code: made of these files already" in capsys.readouterr().err and stamps(grown / "code") == before
    path = grown / "code" / "manifest.json"
    older = re.sub(r',\s*"sums": "tree-[^"]*"|"sha256": "[^"]*",(?=\s*"format")', "", path.read_text())
    path.write_text(older)  # a manifest of before there were lists
    assert make(f"--extend=code={tmp_path}/code/part1", "--held-out=0.2") == 2
    assert f"{tmp_path}/code, in which {tmp_path}/code/part1/1.py lies, already" in capsys.readouterr().err
    write_lines(records / "b.jsonl", TEXTS[300:])
    assert make(f"--extend=lines={records}", "--held-out=0.2") == 2
    assert f"was made of {records}/a.jsonl already" in capsys.readouterr().err


def test_a_tree_that_grew_brings_its_new_files_alone(
    make: Make, grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tmp_path / "code"

    def write(numbers: range) -> None:
        for number in numbers:
            path = tree / f"part{number % 3}" / f"{number}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(TEXTS[number])

    def text() -> dict[str, Any]:
        return dict(SourceManifest.read(grown / "code").text or {})

    write(range(40))
    (tree / "part0" / "picture.bin").write_bytes(b"\0")
    (tree / "part1" / "latin1.py").write_bytes(b"# \xe9\n")  # no document, and so in no list
    assert make(f"--source=code={tree}", *MADE) == 0
    old, first = tokens_of(grown / "code"), text()
    write(range(40, 60))
    assert make(f"--extend=code={tree}", *MADE) == 0
    write(range(60, 66))
    assert make(f"--extend=code={tree}/part1", *MADE) == 0  # 61 and 64
    assert tokens_of(grown / "code").startswith(old)
    found = text()
    assert sum(found["documents"].values()) == 62 and found["files_skipped"] == first["files_skipped"]
    assert [one["files"] for one in found["inputs"]] == [40, 20, 2]
    assert sorted(path.name for path in (grown / "code").glob("*.sums") if "tree" in path.name) == [
        one["sums"] for one in found["inputs"]
    ]
    for one in found["inputs"]:
        assert hashlib.sha256((grown / "code" / one["sums"]).read_bytes()).hexdigest() == one["sha256_of_sums"]
    assert make(f"--extend=code={tree}", *MADE) == 0  # the rest
    before, documents = stamps(grown / "code"), sum(text()["documents"].values())
    assert documents == 66
    capsys.readouterr()
    assert make(f"--extend=code={tree}", *MADE) == 0
    assert "made of these files already" in capsys.readouterr().err
    write_lines(tmp_path / "empty.jsonl", [])
    assert make(f"--extend=code={tree},{tmp_path}/empty.jsonl", *MADE) == 2
    assert "no document for train" in capsys.readouterr().err
    tree = tree.rename(tmp_path / "moved")
    (tree / "part0" / "6.py").rename(tmp_path / "6.py")  # what is gone makes the others not new
    assert make(f"--extend=code={tree}", *MADE) == 0
    assert "made of these files already" in capsys.readouterr().err
    (tmp_path / "6.py").rename(tree / "part0" / "6.py")
    (tree / "part0" / "3.py").write_text("another text")
    assert make(f"--extend=code={tree}", *MADE) == 2
    assert f"{tree}/part0/3.py has another text than when {grown}/code was made" in capsys.readouterr().err
    assert stamps(grown / "code") == before
    tree = tree.rename(tmp_path / "code")
    assert make(f"--source=code={tree}", *MADE) == 0  # anew, of the whole tree
    assert sum(text()["documents"].values()) == documents and len(text()["inputs"]) == 1
    (grown / "code" / "tree-00000-0.sums").write_text("")
    assert make(f"--extend=code={tree}", *MADE) == 2
    assert "tree-00000-0.sums is damaged" in capsys.readouterr().err


def test_records_that_a_tree_left_out_may_be_added(make: Make, grown: Path, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    for number, text in enumerate(TEXTS[:40]):
        (tmp_path / "code" / f"{number}.py").write_text(text)
    write_lines(tmp_path / "code" / "a.jsonl", TEXTS[40:])
    assert make(f"--source=code={tmp_path}/code", "--tree=code", "--held-out=0.2") == 0
    assert make(f"--extend=code={tmp_path}/code/*.jsonl", "--held-out=0.2") == 0


def test_a_manifest_of_an_older_version_is_refused_before_there_is_work(
    make: Make, grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = grown / "a" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"], manifest["text"]["bytes"]
    path.write_text(json.dumps(manifest))
    monkeypatch.setattr(build, "make_piece", None)
    assert make(f"--extend=a={tmp_path}/b.jsonl", *MADE) == 2
    assert "is of an older version: its manifest lacks bytes" in capsys.readouterr().err


def test_what_a_killed_extension_left_is_removed_by_another_one(make: Make, grown: Path, tmp_path: Path) -> None:
    (tmp_path / "evaluation.txt").write_text("document 3 of other things\n")
    given = (*MADE, f"--decontaminate={tmp_path}/evaluation.txt", "--decontaminate-words=5")
    assert make(f"--source=e={tmp_path}/a.jsonl", *given) == 0
    write_lines(tmp_path / "c.jsonl", ["document 3 of other things", *(f"{text}!" for text in TEXTS[:20])])
    assert make(f"--extend=e={tmp_path}/c.jsonl", *given) == 0
    kept = {"contaminated.jsonl", "contaminated-00001.jsonl", "documents-00001.keys", "train-00000.bin"}
    assert kept <= {path.name for path in (grown / "e").iterdir()}
    orphans = {"train-00099.bin", "valid-00099.sums", "documents-00002.keys", "contaminated-00002.jsonl"}
    for name in orphans | {"notes.txt"}:
        (grown / "e" / name).write_text("left")
    write_lines(tmp_path / "b.jsonl", TEXTS[300:])
    assert make(f"--extend=e={tmp_path}/b.jsonl", *given) == 0
    found = {path.name for path in (grown / "e").iterdir()}
    assert kept | {"notes.txt"} <= found
    assert found & orphans == {"documents-00002.keys"}
    assert (grown / "e" / "documents-00002.keys").read_bytes() != b"left"
