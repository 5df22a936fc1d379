"""The seam between gigatoken and tokenizers: equal ids or the slower one, special tokens in a text are text."""

from pathlib import Path

import numpy as np
import pytest

from gpt4moe.corpus import encoder as seam
from gpt4moe.corpus.encoder import HARD, Encoder, choose_library
from tests.corpus.conftest import FIM, TEXTS

DOCUMENTS = [text.encode() for text in (*TEXTS[:20], "a <|endoftext|> b", *HARD, FIM[0] + "x" + FIM[1], "")]


def test_both_libraries_give_the_same_ids_and_ends_also_of_special_tokens_in_a_text(tokenizer_path: Path) -> None:
    pytest.importorskip("gigatoken")
    fast, plain = Encoder(tokenizer_path, "gigatoken"), Encoder(tokenizer_path, "tokenizers")
    for found, expected in zip(fast.encode(DOCUMENTS), plain.encode(DOCUMENTS), strict=True):
        np.testing.assert_array_equal(found, expected)
    special = {fast.tokenizer.backend.token_to_id(name) for name in (*FIM, "<|endoftext|>")}
    assert special.isdisjoint(fast.encode(DOCUMENTS)[0].tolist())


def test_gigatoken_is_chosen_where_a_sample_proves_it_and_not_without_it(
    tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gigatoken")
    assert choose_library(tokenizer_path, DOCUMENTS)[0] == "gigatoken"
    monkeypatch.setattr(Encoder, "agrees", lambda self, *_: False)
    library, reason = choose_library(tokenizer_path, DOCUMENTS)
    assert library == "tokenizers" and "other ids" in reason
    monkeypatch.setattr(seam, "find_spec", lambda name: None)
    library, reason = choose_library(tokenizer_path, DOCUMENTS)
    assert library == "tokenizers" and "not installed" in reason


def test_a_tokenizer_that_gigatoken_does_not_take_goes_to_tokenizers(tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "[UNK]": 1, "document": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "w.json"))
    library, reason = choose_library(tmp_path / "w.json", DOCUMENTS)
    assert library == "tokenizers" and "does not take" in reason
    assert seam.unknown_id(Encoder(tmp_path / "w.json", "tokenizers").tokenizer) == 1
