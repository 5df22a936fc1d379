"""Files of sentencepiece and tiktoken, converted, give the ids of their own library; another file is refused."""

import base64
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt4moe.corpus.encoder import HARD
from gpt4moe.corpus.foreign import convert
from gpt4moe.data.tokenizer import load_tokenizer
from gpt4moe.errors import DataError
from tests.corpus.conftest import TEXTS, write_lines


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_gives_its_own_ids(make: Callable[..., int], tmp_path: Path, kind: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "train.txt").write_text("".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "train.txt"), model_prefix=str(tmp_path / "m"), vocab_size=400, model_type=kind,
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, **({} if kind == "unigram" else {
            "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": True}),
    )  # fmt: skip
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    assert make(f"--source=a={path}", f"--tokenizer={tmp_path}/m.model", "--held-out=0.1") == 0
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.json")
    assert tokenizer.eos_id == own.eos_id()
    assert all(tokenizer.encode(text) == own.encode(text) for text in (*HARD, *TEXTS[:50]))
    assert not list((tmp_path / "out").glob(".*"))


def test_a_tiktoken_file_gives_its_own_ids(make: Callable[..., int], tokenizer_path: Path, tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken._educational import bpe_train

    from gpt4moe.corpus.foreign import SPLITS

    ranks = bpe_train("".join(TEXTS[:100]), 290, SPLITS["cl100k"])
    path = tmp_path / "mine.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    source = write_lines(tmp_path / "a.jsonl", TEXTS)
    given = [f"--source=a={source}", f"--tokenizer={path}", "--held-out=0.1"]
    assert make(*given) == 2
    assert make(*given, "--tiktoken-split=cl100k") == 0
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.json")
    assert tokenizer.eos_id == 290
    own = tiktoken.Encoding("mine", pat_str=SPLITS["cl100k"], mergeable_ranks=ranks, special_tokens={})
    assert all(tokenizer.encode(text) == own.encode_ordinary(text) for text in (*HARD, *TEXTS[:50]))


@pytest.mark.parametrize("name", ["bad.model", "r50k_base.tiktoken"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    pytest.importorskip("sentencepiece")
    pytest.importorskip("tiktoken")
    (tmp_path / name).write_bytes(b"nonsense here\n")
    with pytest.raises(DataError, match=name):
        convert(tmp_path / name, tmp_path / "t.json", [])
