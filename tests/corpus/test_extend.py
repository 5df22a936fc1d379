"""A source that grows gets new shards; the old ones, and the other sources, are not touched."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt4moe.corpus import extend
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
