"""Files of Megatron-LM as a source: hashed, checked against the vocabulary, left where they are."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from gpt4moe.data.check import check_data
from gpt4moe.data.indexed import DocumentIndex
from gpt4moe.data.loader import build_data
from gpt4moe.data.tokenizer import Tokenizer
from tests.data.conftest import VOCAB_SIZE, small_run
from tests.data.mixture_tool import answer
from tools.mixture import main


def megatrons(prefix: Path, documents: list[list[int]]) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(np.asarray(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_files_of_megatron_become_a_source_and_stay_where_they_are(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    old, out = tmp_path / "old", tmp_path / "out"
    old.mkdir()
    tokenizer.backend.save(str(tmp_path / "t.json"))
    one = megatrons(old / "one_text_document", [list(range(1, 200)), [7, 0]])
    two, valid = megatrons(old / "two", [list(range(50, 120))]), megatrons(old / "valid", [list(range(40))])
    before = {path: path.stat().st_mtime_ns for path in old.iterdir()}
    arguments = ["register", str(out), "--tokenizer", str(tmp_path / "t.json"), "--source", f"web={one},{two}"]
    found = answer(capsys, *arguments, "--valid", f"web={valid}")
    assert found == {"web": {"train": {"tokens": 271, "documents": 3}, "valid": {"tokens": 40, "documents": 1}}}
    assert {path: path.stat().st_mtime_ns for path in old.iterdir()} == before
    data = build_data(small_run(out))
    assert len(data.train.samples.streams["web"]) == 271  # type: ignore[attr-defined]
    assert answer(capsys, "verify", str(out))["problems"] == []
    shutil.copytree(out / "web", out / "again")
    check_data(small_run(out))


def test_a_token_beyond_the_vocabulary_is_found_at_the_door(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.backend.save(str(tmp_path / "t.json"))
    bad = megatrons(tmp_path / "bad", [[1, 2, VOCAB_SIZE]])
    out = tmp_path / "out"
    good = megatrons(tmp_path / "good", [[1, 2, 3]])
    for train, valid in ((bad, good), (good, bad)):
        arguments = [f"--source=web={train}", f"--valid=web={valid}", f"--tokenizer={tmp_path / 't.json'}"]
        assert main(["register", str(out), *arguments]) == 2
        said = capsys.readouterr().err
        assert f"bad.bin has the token {VOCAB_SIZE}" in said
    assert not list(out.glob("*"))


def test_a_file_named_twice_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.backend.save(str(tmp_path / "t.json"))
    one = megatrons(tmp_path / "one", [[1, 2, 3]])
    arguments = [f"--source=web={one},{tmp_path}/../{tmp_path.name}/one", f"--tokenizer={tmp_path / 't.json'}"]
    assert main(["register", str(tmp_path / "out"), *arguments, f"--valid=web={megatrons(tmp_path / 'v', [[1]])}"]) == 2
    assert "one twice" in capsys.readouterr().err


def test_text_that_is_learned_is_not_held_out(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.backend.save(str(tmp_path / "t.json"))
    one, two = (megatrons(tmp_path / name, [[1, 2, 3]]) for name in ("one", "two"))
    (tmp_path / "link").symlink_to(tmp_path)
    arguments = [f"--source=web={one}", f"--valid=web={two},{tmp_path}/link/one", f"--tokenizer={tmp_path / 't.json'}"]
    assert main(["register", str(tmp_path / "out"), *arguments]) == 2
    assert "one for training and for validation" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_of_an_index_is_found_at_the_door(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its ends are those of the .bin all the same; nothing has its hash yet."""
    tokenizer.backend.save(str(tmp_path / "t.json"))
    good = megatrons(tmp_path / "good", [[1] * (3 + i % 5) for i in range(20)])
    content, entries = Path(f"{good}.idx").read_bytes(), 34
    flips = [
        entries + 4 * 7, entries + 4 * 7 + 3, entries + 4 * 20 + 8 * 7, entries + 4 * 20 + 8 * 7 + 7,
        entries + 12 * 20, entries + 12 * 20 + 8 * 7, entries + 12 * 20 + 8 * 7 + 7, entries + 12 * 20 + 8 * 20,
    ]  # fmt: skip
    valid = megatrons(tmp_path / "valid", [[1, 2, 3]])
    for at in flips:
        damaged = bytearray(content)
        damaged[at] ^= 128
        Path(f"{good}.idx").write_bytes(damaged)
        arguments = [f"--source=web={good}", f"--valid=web={valid}", f"--tokenizer={tmp_path / 't.json'}"]
        assert main(["register", str(tmp_path / "out"), *arguments]) == 2, at
        said = capsys.readouterr().err
        assert f"{good}.idx is damaged: it has" in said and "Restore the file" in said
    Path(f"{good}.idx").write_bytes(content)
    DocumentIndex(good).require_sound()
