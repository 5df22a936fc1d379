"""Byte-level BPE: exact size, lossless, and no text can end a document."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt4moe.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from gpt4moe.errors import DataError


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_any_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_vocabulary_has_exactly_the_asked_size_and_eos_is_zero(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (300, 0)
    assert tokenizer.backend.get_vocab_size() == 300


def test_training_twice_gives_the_same_tokenizer() -> None:
    text = [Path(__file__).read_text()] * 3
    first, second = (train_tokenizer(text, vocab_size=400).backend.to_str() for _ in range(2))
    assert first == second


def test_eos_spelled_in_a_text_is_text(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a <|endoftext|> b")
    assert tokenizer.eos_id not in tokens
    assert tokenizer.decode(tokens) == "a <|endoftext|> b"


def test_eos_spelled_in_a_text_is_text_whatever_the_file_says_of_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    stored = json.loads(tokenizer.backend.to_str())
    stored["added_tokens"][0]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.eos_token == "<|endoftext|>" and loaded.eos_id not in loaded.encode("a<|endoftext|>b")


def test_a_saved_tokenizer_loads_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.backend.save(str(tmp_path / "t.json"))
    loaded = load_tokenizer(tmp_path / "t.json")
    text = "word7 and <|endoftext|> things"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.encode_batch([text, "x"]) == [tokenizer.encode(text), tokenizer.encode("x")]


def test_too_little_text_says_how_large_a_vocabulary_it_yields() -> None:
    with pytest.raises(DataError, match="not 1000") as refusal:
        train_tokenizer(["hello hello world"], vocab_size=1000)
    assert "or fewer" in refusal.value.cure


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(DataError, match="below 257"):
        train_tokenizer(["hello"], vocab_size=256)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(DataError, match="is no tokenizer"):
        load_tokenizer(tmp_path / "t.json")
