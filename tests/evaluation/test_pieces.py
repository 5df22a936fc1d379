"""Texts cut to the context: every token once, as the harness and training cut them."""

from pathlib import Path

import pytest

from gpt4moe.errors import DataError
from gpt4moe.evaluation.corpus import read_sources
from gpt4moe.evaluation.pieces import answer_piece, encode_pair, windows
from gpt4moe.inference.text import words_of_files
from tests.numbered_lines import VOCABULARY, numbered_lines, plant_token


@pytest.mark.parametrize("length", [1, 2, 5, 8, 9, 10, 17, 31])
@pytest.mark.parametrize("context", [1, 4, 8])
def test_windows_score_every_token_but_the_first_once(length: int, context: int) -> None:
    scored: list[int] = []
    for piece in windows(range(length), context):
        assert 1 <= piece.num_scored < len(piece.tokens) <= context + 1
        assert len(piece.tokens) == min(context + 1, length)  # the last window too has all the context there is
        scored += piece.tokens[-piece.num_scored :]
    assert scored == list(range(1, length))


def test_spaces_at_the_end_of_a_prompt_belong_to_the_answer() -> None:
    def encode(text: str) -> list[int]:
        return [ord(character) for character in text]

    assert encode_pair(encode, "1 + 1 = ", "2") == (encode("1 + 1 ="), encode(" 2"))
    assert encode_pair(encode, "", "2") == ([], encode("2"))


def test_a_long_prompt_loses_its_beginning() -> None:
    piece = answer_piece(range(10), [20, 21], 4)
    assert list(piece.tokens) == [7, 8, 9, 20, 21] and piece.num_scored == 2
    assert answer_piece([1], range(10), 4).num_scored == 4


def test_a_data_folder_with_a_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = numbered_lines(tmp_path)
    words = words_of_files(folder, vocab_size=VOCABULARY, context_length=16)
    assert [source.name for source in read_sources(folder, words, max_tokens=None)] == ["alpha"]
    plant_token(folder / "alpha", "valid-00000", 11, VOCABULARY)
    with pytest.raises(DataError, match=r"has the token 300.*alpha/valid-00000.bin, token 11 \("):
        read_sources(folder, words, max_tokens=None)
