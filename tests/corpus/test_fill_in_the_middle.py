"""Fill-in-the-middle: each document comes back from its parts, by the seed and its bytes alone."""

from pathlib import Path

from gpt4moe.corpus.fill_in_the_middle import FillInTheMiddle, token_ids
from gpt4moe.data.tokenizer import load_tokenizer
from tests.corpus.conftest import FIM, TEXTS

PRE, MID, SUF = 1001, 1002, 1003


def restored(parts: list[int | bytes]) -> tuple[str, bytes]:
    """The form, and the document that parts were made of."""
    match parts:
        case [1001, bytes(prefix), 1003, bytes(suffix), 1002, bytes(middle)]:
            return "PSM", prefix + middle + suffix
        case [1001, 1003, bytes(suffix), 1002, bytes(begin)]:
            return "SPM", begin + suffix
    raise AssertionError(parts)


def test_the_rate_and_the_share_of_forms_are_kept_and_nothing_is_lost() -> None:
    fim = FillInTheMiddle(0.5, 0.25, 1, (PRE, MID, SUF))
    forms = {"PSM": 0, "SPM": 0}
    for text in TEXTS:
        parts = fim.parts(text, text.encode())
        if parts is not None:
            form, data = restored(parts)
            assert data.decode() == text
            forms[form] += 1
    assert 160 < sum(forms.values()) < 240 and 30 < forms["SPM"] < 70


def test_the_cut_depends_on_the_seed_and_the_document_alone() -> None:
    ways = [[FillInTheMiddle(0.5, 0.5, seed, (PRE, MID, SUF)).parts(text, text.encode()) for text in TEXTS]
            for seed in (1, 1, 2)]  # fmt: skip
    assert ways[0] == ways[1] != ways[2]


def test_the_tokens_are_found_by_their_known_names(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    assert token_ids(tokenizer, None) == tuple(tokenizer.backend.token_to_id(name) for name in FIM)
