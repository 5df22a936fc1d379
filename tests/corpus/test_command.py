"""tools/tokenize_corpus.py: files in, a data folder that a run accepts out; bad ones refused in two lines."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt4moe.corpus import build, inputs
from gpt4moe.data.check import check_data
from gpt4moe.data.folder import held_out
from gpt4moe.data.manifest import SourceManifest
from gpt4moe.data.tokenizer import load_tokenizer, train_tokenizer
from tests.corpus.conftest import FIM, TEXTS, tokens_of, write_lines
from tests.data.conftest import shard, small_run

ROOT = Path(__file__).resolve().parents[2]
Make = Callable[..., int]


def test_json_lines_become_a_folder_that_a_run_accepts(make: Make, tokenizer_path: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", TEXTS[:60])
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write("\n".join(json.dumps({"id": "x", "text": text}) for text in TEXTS[60:]))
    status = make(
        f"--source=books={tmp_path}/a.jsonl,{tmp_path}/b.jsonl.gz", "--licence=books=CC0-1.0", "--held-out=0.2"
    )
    assert status == 0
    out = tmp_path / "out"
    check_data(small_run(out, "model.vocab_size=320"))
    manifest = SourceManifest.read(out / "books")
    assert manifest.licence == "CC0-1.0"
    tokenizer = load_tokenizer(tokenizer_path)
    read = {
        tokenizer.decode(tokens.document(i)[:-1].tolist()): split
        for split in ("train", "valid")
        for tokens in [shard(out, "books", split)]
        for i in range(tokens.num_documents)
    }
    assert read == {text: "valid" if held_out(text, 0.2) else "train" for text in TEXTS}
    assert manifest.text is not None
    assert sum(manifest.text["documents"].values()) == len(TEXTS)
    assert sum(manifest.text["bytes_read"].values()) == sum(len(text.encode()) for text in TEXTS)
    assert [one["path"] for one in manifest.text["inputs"]] == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl.gz"]


def test_help_shows_examples_when_run_as_a_script_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "tokenize_corpus.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "no json": ("a.jsonl", b'{"text": "fine"}\nnonsense\n', "a.jsonl:2"),
    "a list": ("a.jsonl", b"[1]\n", "a.jsonl:1"),
    "a string": ("a.jsonl", b'"text"\n', "a.jsonl:1"),
    "another key": (
        "a.jsonl",
        b'\n{"text": "fine"}\n{"id": "1", "metadata": {}, "words": 1}\n',
        "a.jsonl:3 has no key 'text'",
    ),
    "a number": ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1: 'text' is of type int"),
    "null": ("a.jsonl", b'{"text": null}\n', "NoneType"),
    "Latin-1": ("a.jsonl", b'{"text": "fine"}\n{"text": "\xe4h"}\n', "a.jsonl:2 is not UTF-8: byte 0xe4"),
    "a surrogate": ("a.jsonl", b'{"text": "a\\ud800b"}\n', "a.jsonl:1 has half of a surrogate pair"),
    "deep": ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "a.jsonl:1"),
    "gzip by another name": ("a.jsonl", gzip.compress(b"{}"), "is gzip inside"),
    "UTF-16": ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "is UTF-16 inside"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "fine and long enough"}\n' * 9)[:-9], "damaged or cut short"),
    "no gzip": ("a.jsonl.gz", b'{"text": "fine"}\n', "damaged or cut short"),
    "cut zstd": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04\x00\x41", "damaged or cut short"),
    "an empty gzip": ("a.jsonl.gz", b"", "a.jsonl.gz is empty"),
    "an empty zstd": ("a.jsonl.zst", b"", "a.jsonl.zst is empty"),
    "no parquet": ("a.parquet", b"PAR1", "is no parquet file"),
    "Latin-1 text": ("a.txt", b"\xe4h", "a.txt is not UTF-8"),
    "empty": ("a.jsonl", b"", "there is no document"),
    "blank documents": ("a.jsonl", b'{"text": ""}\n', "there is no document"),
    "an unknown suffix": ("a.docx", b"text", "names no kind of file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_with_its_line_and_leaves_nothing(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    name, data, said = BAD_FILES[case]
    (tmp_path / name).write_bytes(data)
    assert make(f"--source=x={tmp_path}/{name}") == 2
    errors = capsys.readouterr().err
    assert said in errors and "fix:" in errors
    assert not (tmp_path / "out" / "manifest.json").exists() and not (tmp_path / "out" / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--source=a={0}", "--source=a={0}"], "given twice"),
        (["--source=a={0},{0}"], "twice"),
        (["--source=../evil={0}"], "cannot name a source"),
        (["--source=a/b={0}"], "cannot name a source"),
        (["--source=.={0}"], "cannot name a source"),
        (["--source=a={0}.missing"], "is missing"),
        (["--source=a={0}.*.jsonl"], "nothing matches"),
        (["--source=a={0}", "--licence=zzz=MIT"], "of no source"),
        (["--source=a={0}", "--fim=a=0.5", "--fim=a=0.2"], "--fim a= is given twice"),
        (["--source=a={0}", "--tree=b"], "of no source"),
        (["--source=a={0}", "--held-out=2"], "held-out is 2"),
        (["--source=a={0}", "--held-out=0"], "--held-out is 0: every source has"),
        (["--source=a={0}", "--held-out=1e-9"], "(400 for train, 0 for valid): --held-out 1e-09 of 400 chose none"),
        (["--source=a={0}", "--fim=a=much"], "--fim"),
        (["--source=a={0}", "--fim=a=0.5", "--fim-tokens=<a>,<b>,<c>"], "needs three special tokens"),
        (["--source=a={0}", "--processes=0"], "--processes is 0"),
        (["--source=a={0}", "--decontaminate={0}.missing"], "is missing"),
        (["--source=a={0}", "--train-tokenizer=9"], "257"),
        (["--source=a={0}", "--tokenizer={0}.missing"], "is missing"),
        (["--source=a={0}", "--out={0}"], "exists"),
        (["--source=a={0}", "--out={0}/below"], "directory"),
    ],
)
def test_an_option_that_means_nothing_is_refused(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    assert make(*(word.format(path) for word in arguments)) == 2
    errors = capsys.readouterr().err
    assert said in errors and "fix:" in errors
    assert sorted(item.name for item in tmp_path.iterdir() if item.name != "out") == ["a.jsonl"]
    assert not list(tmp_path.glob("out/[a-z]*"))


def test_a_tokenizer_is_trained_with_the_tokens_of_fill_in_the_middle(make: Make, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    assert make(f"--source=code={path}", "--train-tokenizer=300", "--fim=code=0.5", "--held-out=0.1") == 0
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.json")
    assert tokenizer.vocab_size == 300
    assert all(tokenizer.backend.token_to_id(name) is not None for name in FIM)


def test_a_second_source_uses_the_folder_s_tokenizer_and_leaves_the_first(make: Make, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    assert make(f"--source=a={path}", "--held-out=0.1") == 0
    before = (tmp_path / "out" / "a" / "manifest.json").stat().st_mtime_ns
    from tools.tokenize_corpus import main

    assert main([f"--out={tmp_path}/out", f"--source=b={path}", "--held-out=0.1"]) == 0
    assert (tmp_path / "out" / "a" / "manifest.json").stat().st_mtime_ns == before
    assert (tmp_path / "out" / "b" / "train-00000.bin").is_file()


def test_nobody_s_files_are_replaced(make: Make, tokenizer_path: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out" / "web").mkdir(parents=True)
    path = write_lines(tmp_path / "out" / "web" / "a.jsonl", TEXTS)
    assert make("--source", f"web={tmp_path / 'out' / 'web'}") == 2
    assert "is no source: nothing is written in its place" in capsys.readouterr().err
    assert path.is_file()
    for name in ("tokenizer.json", "manifest.json"):
        assert make("--source", f"{name}={path}") == 2
    assert make("--source", f"b={path},") == 2
    assert "a path is empty" in capsys.readouterr().err
    hidden = tmp_path / ".mine.json"
    hidden.write_bytes(tokenizer_path.read_bytes())
    assert make("--source", f"b={path}", "--tokenizer", str(hidden)) == 0
    assert hidden.is_file()


def test_truncation_padding_and_holes_of_a_tokenizer_s_file_change_no_token(
    make: Make, tokenizer_path: Path, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    found = json.loads(tokenizer_path.read_text())
    found["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    found["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": "<|endoftext|>"}  # fmt: skip
    (tmp_path / "cut.json").write_text(json.dumps(found))
    assert make("--source", f"a={path}") == 0
    assert make("--source", f"a={path}", f"--tokenizer={tmp_path / 'cut.json'}", f"--out={tmp_path / 'cut'}") == 0
    assert tokens_of(tmp_path / "cut" / "a") == tokens_of(tmp_path / "out" / "a")
    assert load_tokenizer(tmp_path / "cut.json").vocab_size == 320


def test_a_piece_without_a_document_is_no_hindrance(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "_PIECE_BYTES", (4096, 4096))
    path = write_lines(tmp_path / "a.jsonl", ["one line for two pieces and more " * 400, *TEXTS])
    assert make("--source", f"a={path}", "--deduplicate") == 0
    manifest = SourceManifest.read(tmp_path / "out" / "a")
    assert sum(manifest.num_documents(split) for split in ("train", "valid")) == len(TEXTS) + 1


def test_a_name_that_is_no_utf_8_is_counted(make: Make, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "tree" / f"{number}.py").write_text(text)
    (tmp_path / "tree" / os.fsdecode(b"caf\xe9.py")).write_text("x = 1\n")
    assert make("--source", f"code={tmp_path / 'tree'}") == 0
    assert '"name is no UTF-8": 1' in (tmp_path / "out" / "code" / "manifest.json").read_text()


@pytest.mark.parametrize("name", ["tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("tokenizer", ["--tokenizer={0}", "--train-tokenizer=300"])
def test_a_folder_in_the_place_of_a_file_is_refused_before_there_is_work(
    make: Make, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, tokenizer: str
) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    assert make(f"--source=a={path}", tokenizer.format(tokenizer_path)) == 2
    assert f"{name} is a folder" in capsys.readouterr().err


def test_a_folder_that_is_not_finished_takes_no_source_of_another_tokenizer(
    make: Make, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write_lines(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    assert make(f"--source=a={path}", "--held-out=0.1") == 0
    (out / "manifest.json").unlink()
    train_tokenizer(TEXTS, vocab_size=300).backend.save(str(tmp_path / "other.json"))
    given = (f"--tokenizer={tmp_path / 'other.json'}", "--held-out=0.1")
    assert make(f"--source=b={path}", *given) == 2
    assert "was made by another tokenizer" in capsys.readouterr().err and not (out / "b").exists()
    assert make(f"--source=b={path}", "--held-out=0.1") == 0  # by the same one
    (out / "manifest.json").unlink()
    assert make(f"--source=a={path}", f"--source=b={path}", *given) == 0  # all are made anew


def test_ctrl_c_ends_the_command_in_two_lines(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "make_piece", interrupted)
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    assert make(f"--source=a={path}") == 130
    assert "Stopped by Ctrl-C" in capsys.readouterr().err
    monkeypatch.undo()
    assert make(f"--source=a={path}") == 0


def test_a_tree_is_read_without_the_data_folder_that_lies_in_it(make: Make, tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.py").write_text(text)
    for name in ("a", "b"):  # when b is made, the manifests and the tokenizer are there
        assert make(f"--source={name}={tmp_path}", f"--out={tmp_path / 'out'}", "--suffixes=.py,.json") == 0
        text = SourceManifest.read(tmp_path / "out" / name).text
        assert text is not None and sum(text["documents"].values()) == len(TEXTS)
        assert text["files_skipped"] == ({} if name == "a" else {"the data folder itself": 1})


def test_the_place_of_a_contaminated_document_is_counted_without_reading_the_file_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "_PIECE_BYTES", (4096, 4096))
    path = write_lines(tmp_path / "a.jsonl", [f"{text} {i}" for i, text in enumerate(TEXTS)])
    again = write_lines(tmp_path / "b.jsonl", ["nothing here", f"{TEXTS[390]} 390"])
    (tmp_path / "tasks.txt").write_text("".join(f"document {i} of other things\n" for i in (3, 250, 390)))
    monkeypatch.setattr("gpt4moe.corpus.piece.place_of", lambda *_: pytest.fail("read from its beginning"))
    given = (f"--decontaminate={tmp_path / 'tasks.txt'}", "--decontaminate-words=5")
    assert make(f"--source=a={path},{again}", *given) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "a" / "contaminated.jsonl").read_text().splitlines()]
    assert [row["document"] for row in rows] == [f"{path}:4", f"{path}:251", f"{path}:391", f"{again}:2"]
    assert set(rows[0]) == {"document", "evaluation", "words"}


def test_a_tree_with_latin_1_says_what_to_do(make: Make, tmp_path: Path, capsys: Any) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a.txt").write_bytes(b"caf\xe9")
    assert make(f"--source=a={tree}") == 2
    told = capsys.readouterr().err
    assert "no document to be found (1 files not UTF-8)" in told and "iconv -f LATIN1" in told
    for number, text in enumerate(TEXTS):
        (tree / f"{number}.txt").write_text(text)
    assert make(f"--source=a={tree}") == 0
    assert "a: files not read: 1 not UTF-8\na: of the files" in capsys.readouterr().out
