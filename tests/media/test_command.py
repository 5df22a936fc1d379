"""tools/prepare_media.py: options that mean nothing are refused before anything is read; what was made is said."""

from pathlib import Path
from typing import Any

import pytest

from gpt4moe.media.command import prepare, summary
from tests.media.conftest import pairs, words
from tools.prepare_media import main


def test_what_was_made_is_said_of_each_source(tokenizer_path: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    path = pairs(tmp_path / "a", 12)
    facts = prepare(words(tokenizer_path, tmp_path / "data", path, "--valid", f"a={path}"), seen.append)
    train, valid, left_out = summary("a", facts["a"])
    assert sum(seen) == 24 and train.startswith("a train: 12 documents,") and valid.startswith("a valid: 12 documents,")
    assert (
        "12 images, 12 frames, 12 distinct (0.0 MB)" in train and left_out == "a: left out: 0 bad images, 0 documents"
    )


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--max-pixels", "99999999999"], "--max-pixels is 99999999999"), (["--workers", "0"], "--workers is 0"),
        (["--max-bad", "2"], "--max-bad is 2.0"), (["--valid", "b=x"], "--valid names b"),
        (["--source", "a=b"], "--source a= is given twice"), (["--images", "nowhere"], "nowhere is no folder"),
        (["--source", "b=nowhere.jsonl"], "nowhere.jsonl is missing"),
        (["--vocab-size", "3"], "--vocab-size 3"), (["--image-token", "the"], "has no token the"),
        (["--image-token", "<|endoftext|>"], "<|endoftext|> ends texts"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(
    tokenizer_path: Path, tmp_path: Path, capsys: Any, more: list[str], told: str
) -> None:
    path = pairs(tmp_path / "a", 12)
    assert main(words(tokenizer_path, tmp_path / "data", path, *more)) == 2
    assert told in capsys.readouterr().err


def test_a_list_of_bad_images_does_not_outlive_the_call_that_wrote_it(tokenizer_path: Path, tmp_path: Path) -> None:
    path = pairs(tmp_path / "a", 12)
    whole = (tmp_path / "a" / "3.png").read_bytes()
    (tmp_path / "a" / "3.png").write_bytes(b"")
    listing = tmp_path / "data" / "a.bad_images.jsonl"
    assert main(words(tokenizer_path, tmp_path / "data", path)) == 2 and listing.is_file()
    (tmp_path / "a" / "3.png").write_bytes(whole)
    assert main(words(tokenizer_path, tmp_path / "data", path)) == 0 and not listing.exists()


def test_a_small_set_is_told_which_share_to_hold_out(tokenizer_path: Path, tmp_path: Path, capsys: Any) -> None:
    path = pairs(tmp_path / "a", 12)
    assert main([*words(tokenizer_path, tmp_path / "data", path), "--held-out", "0"]) == 2
    told = capsys.readouterr().err
    assert "Source a has no document for valid (12 for train, 0 for valid): --held-out 0 of 12 chose none." in told
    assert "set --held-out 0.42, or name held-out files: --valid a=FILE." in told
