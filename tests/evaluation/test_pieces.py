"""Texts cut to the context: every token once, as the harness and training cut them."""

import pytest

from gpt4moe.evaluation.pieces import answer_piece, encode_pair, windows


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
