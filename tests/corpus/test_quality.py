"""Nonsense is refused with its numbers, and made where it is meant."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.corpus.conftest import TEXTS, write_lines

Make = Callable[..., int]


def test_mostly_unknown_tokens_are_refused_with_their_share_unless_accepted(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "<unk>": 1, "document": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "w.json"))
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    given = [f"--source=a={path}", f"--tokenizer={tmp_path}/w.json", "--held-out=0.1"]
    assert make(*given) == 2
    errors = capsys.readouterr().err
    assert "tokens are <unk>, more than 1%" in errors and "--accept-nonsense" in errors
    assert make(*given, "--accept-nonsense") == 0
    assert "% unknown" in capsys.readouterr().out


def test_a_tokenizer_that_drops_characters_in_silence_is_refused(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = {name: number for number, name in enumerate(["<|endoftext|>", *"abcdefghijkl "])}
    Tokenizer(models.BPE(vocabulary, [])).save(str(tmp_path / "w.json"))
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    assert make(f"--source=a={path}", f"--tokenizer={tmp_path}/w.json", "--held-out=0.1") == 2
    assert "of a sample, decoding its tokens gives back" in capsys.readouterr().err


def test_a_source_of_one_character_is_refused_by_its_entropy(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [f"{'~' * 4000}{i}" for i in range(40)])
    assert make(f"--source=a={path}", "--held-out=0.1") == 2
    assert "bits of unigram entropy, below 2.0" in capsys.readouterr().err
