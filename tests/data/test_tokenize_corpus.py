"""tools/tokenize_corpus.py: JSON lines in, a data folder that a run accepts out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpt4moe.data.check import check_data
from gpt4moe.data.manifest import SourceManifest
from gpt4moe.data.preprocess import held_out, read_jsonl
from gpt4moe.data.tokenizer import Tokenizer
from gpt4moe.errors import DataError
from tests.data.conftest import shard, small_run
from tools.tokenize_corpus import main

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"document {i} of other things, {'more ' * (i % 5)}\n" for i in range(100)]


def test_json_lines_become_a_folder_that_a_run_accepts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(lines[:60]))
    (tmp_path / "b.jsonl").write_text("".join(lines[60:]) + "\n")
    tokenizer.backend.save(str(tmp_path / "t.json"))
    out = tmp_path / "out"
    status = main([
        f"--tokenizer={tmp_path}/t.json", f"--out={out}", f"--source=books={tmp_path}/a.jsonl,{tmp_path}/b.jsonl",
        "--licence=books=CC0-1.0", "--held-out=0.2",
    ])  # fmt: skip
    assert status == 0
    check_data(small_run(out))
    assert SourceManifest.read(out / "books").licence == "CC0-1.0"
    read = {
        tokenizer.decode(tokens.document(i)[:-1].tolist()): split
        for split in ("train", "valid")
        for tokens in [shard(out, "books", split)]
        for i in range(tokens.num_documents)
    }
    assert read == {text: "valid" if held_out(text, 0.2) else "train" for text in TEXTS}


def test_a_bad_line_is_named_and_leaves_no_manifest(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"words": 1}\n')
    tokenizer.backend.save(str(tmp_path / "t.json"))
    status = main([f"--tokenizer={tmp_path}/t.json", f"--out={tmp_path}/out", f"--source=x={tmp_path}/a.jsonl"])
    assert status == 2
    assert "a.jsonl:2" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_help_shows_examples_when_run_as_a_script_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "tokenize_corpus.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"text": 3}', '"text"'])
def test_only_objects_with_a_text_are_documents(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:1"):
        list(read_jsonl([tmp_path / "a.jsonl"]))


def test_a_held_out_share_is_kept_roughly_and_by_content() -> None:
    flags = [held_out(f"text {i}", 0.1) for i in range(2000)]
    assert 150 < sum(flags) < 250
    assert flags == [held_out(f"text {i}", 0.1) for i in range(2000)]
