"""Chat lines become a source of a data folder, as other sources are; bad lines are an error, or listed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt4moe.chat.command import prepare
from gpt4moe.chat.source import ChatFiles, write_chat_source
from gpt4moe.chat.words import ChatWords, read_words
from gpt4moe.config.load import load_run_config
from gpt4moe.data.catalogue import Catalogue
from gpt4moe.data.check import check_data
from gpt4moe.data.command import answer
from gpt4moe.data.indexed import IndexedTokens
from gpt4moe.data.origins import line_of
from gpt4moe.errors import DataError
from gpt4moe.inference.text import words_of_files
from tools.prepare_chat import main


def lines(path: Path, count: int, bad: dict[int, Any] | None = None) -> Path:
    """`count` conversations, line n of n words; `bad` stands in place of some."""
    rows = [
        {"messages": [{"role": "user", "content": f"word{n}?"}, {"role": "assistant", "content": " and".join("x" * n)}]}
        for n in range(1, count + 1)
    ]
    for number, row in (bad or {}).items():
        rows[number - 1] = row
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_source_has_whole_conversations_masks_and_hashes_and_stands_beside_others(
    own: ChatWords, tmp_path: Path
) -> None:
    files = ChatFiles(
        train=[lines(tmp_path / "a.jsonl", 40)], valid=[lines(tmp_path / "b.jsonl", 3)], licence="CC0-1.0"
    )
    out = tmp_path / "data"
    count = write_chat_source(out, "chat", files, own, shard_bytes=300)
    write_chat_source(out, "more", files, own)
    catalogue = Catalogue.open([out])
    catalogue.require_whole()
    source = catalogue.sources["chat"]
    assert len(source.manifest.train) > 2 and source.manifest.num_documents("train") == 40
    tokens, mask = source.tokens("train")[:], source.mask("train")[:]
    assert (len(tokens), int(mask.sum())) == (count.splits["train"].tokens, count.splits["train"].learned)
    first = IndexedTokens(out / "chat" / "train-00000").document(2)
    assert own.tokenizer.decode(first.tolist()).startswith(
        "user<|endoftext|>word3?<|endoftext|>assistant<|endoftext|>x"
    )
    assert own.tokenizer.decode(tokens[mask > 0].tolist()).startswith("x<|endoftext|>x andx<|endoftext|>")
    assert answer("verify", [str(out)]).status == 0
    path = out / "chat" / "train-mask-00001.bin"
    damaged = bytearray(path.read_bytes())
    damaged[3] ^= 1
    path.write_bytes(damaged)
    assert answer("verify", [str(out)]).status == 1
    with pytest.raises(DataError, match="is damaged"):
        _ = source.mask("train")[:]


def test_a_mask_is_part_of_the_data_s_hash(own: ChatWords, tmp_path: Path) -> None:
    hashes = []
    for weight in (0, 1):
        message = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": weight}
        path = lines(tmp_path / "a.jsonl", 4, {2: {"messages": [*message, *[{**m, "weight": 1} for m in message]]}})
        write_chat_source(tmp_path / str(weight), "chat", ChatFiles(train=[path], valid=[path]), own)
        hashes.append(Catalogue.open([tmp_path / str(weight)]).fingerprint())
    assert hashes[0] != hashes[1]


def test_megatron_reads_what_is_written(own: ChatWords, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    path = lines(tmp_path / "a.jsonl", 9)
    write_chat_source(tmp_path / "data", "chat", ChatFiles(train=[path], valid=[path]), own)
    for name in ("train-00000", "train-mask-00000"):
        ours, theirs = (kind(p) for kind, p in ((IndexedTokens, tmp_path / "data/chat" / name),
                                                (IndexedDataset, str(tmp_path / "data/chat" / name))))  # fmt: skip
        assert len(theirs) == ours.num_documents == 9
        for number in range(9):
            np.testing.assert_array_equal(theirs[number], ours.document(number))


def test_bad_lines_are_an_error_or_left_out_and_listed(own: ChatWords, tmp_path: Path, capsys: Any) -> None:
    path = lines(tmp_path / "a.jsonl", 40, {3: {"messages": []}, 5: {"text": "x"}})
    out = tmp_path / "data"
    words = ["--tokenizer", str(own.path), "--out", str(out), "--source", f"chat={path}", "--held-out", "0.2"]
    with pytest.raises(DataError, match="2 lines"):
        prepare(words, lambda lines: None)
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "2 lines" in told and "a.jsonl:3: the conversation is empty" in told and "a.jsonl:5" in told
    assert not (out / "chat").exists()
    assert main([*words, "--bad-rows", "skip", "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)["chat"]
    assert counted["skipped"] == 2 and counted["train"]["conversations"] + counted["valid"]["conversations"] == 38
    listed = [json.loads(line) for line in (out / "chat" / "skipped.jsonl").read_text().splitlines()]
    assert [one["where"].rpartition(":")[2] for one in listed] == ["3", "5"]


def test_another_template_name_or_vocabulary_is_refused(own: ChatWords, hugging_face: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", 4)
    files = ChatFiles(train=[path], valid=[path])
    write_chat_source(tmp_path / "data", "chat", files, read_words(hugging_face), vocab_size=320)
    assert Catalogue.open([tmp_path / "data"]).vocabulary.vocab_size == 320
    (tmp_path / "t.jinja").write_text((hugging_face / "chat_template.jinja").read_text() + " ")
    with pytest.raises(DataError, match="another chat template"):
        write_chat_source(tmp_path / "data", "b", files, read_words(hugging_face, tmp_path / "t.jinja"))
    with pytest.raises(DataError, match="cannot name a source"):
        write_chat_source(tmp_path / "data", "tokenizer", files, own)
    with pytest.raises(DataError, match="--vocab-size 100"):
        write_chat_source(tmp_path / "new", "chat", files, own, vocab_size=100)


def test_the_tokens_that_end_a_turn_end_an_answer_of_generation_too(hugging_face: Path, tmp_path: Path) -> None:
    words, path = read_words(hugging_face), lines(tmp_path / "a.jsonl", 4)
    eos, end = words.eos_id, words.backend.token_to_id("<|im_end|>")
    assert words.generation["eos_token_id"] == eos != end
    for name in ("one", "two"):
        write_chat_source(tmp_path / "data", name, ChatFiles(train=[path], valid=[path]), words)
        kept = words_of_files(tmp_path / "data" / "tokenizer", vocab_size=302, context_length=64)
        assert kept.end_ids == {eos, end}


def test_a_tokenizer_s_folder_that_a_kill_left_unfinished_is_written_again(own: ChatWords, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", 4)
    (tmp_path / "data" / "tokenizer").mkdir(parents=True)
    write_chat_source(tmp_path / "data", "chat", ChatFiles(train=[path], valid=[path]), own)
    assert read_words(tmp_path / "data" / "tokenizer").template == own.template


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\x1f\x8b\x08\x00", "a.jsonl:1 is no UTF-8"),
        ("{\"messages\": \"caf\u00e9\"}\n".encode("latin-1"), "a.jsonl:1 is no UTF-8"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}\n', "half of a surrogate pair"),
        (b'{"messages": ' + b"[" * 100_000 + b"\n", "is no JSON"),
        (b'[\n{"messages": []},\n{"messages": []}\n]\n', "a.jsonl begins as one JSON array"),
        (b'[{"messages": []}]\n', "a.jsonl begins as one JSON array"),
    ],
)  # fmt: skip
def test_a_line_that_is_none_is_named(own: ChatWords, tmp_path: Path, content: bytes, told: str, capsys: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    words = ["--tokenizer", str(own.path), "--out", str(tmp_path / "data"), "--source", f"chat={path}"]
    assert main(words) == 2
    assert told in capsys.readouterr().err


def test_a_source_named_twice_and_a_template_that_is_no_jinja_are_refused(
    own: ChatWords, tmp_path: Path, capsys: Any
) -> None:
    path = lines(tmp_path / "a.jsonl", 4)
    words = ["--tokenizer", str(own.path), "--out", str(tmp_path / "data"), "--source", f"chat={path}"]
    assert main([*words, "--source", f"chat={path}"]) == 2
    assert "--source chat= is given twice" in capsys.readouterr().err
    (tmp_path / "t.jinja").write_text("{% for %}")
    assert main([*words, "--template", str(tmp_path / "t.jinja")]) == 2
    assert "is no jinja" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../chat", "a/b", "a b"])
def test_a_name_that_leads_out_of_the_folder_is_refused(own: ChatWords, tmp_path: Path, name: str, capsys: Any) -> None:
    path = lines(tmp_path / "a.jsonl", 4)
    words = ["--tokenizer", str(own.path), "--out", str(tmp_path / "data"), "--source", f"{name}={path}"]
    assert main([*words, "--held-out", "0.5"]) == 2
    assert f"{name!r} cannot name a source" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_share_above_1_is_refused(own: ChatWords, tmp_path: Path, capsys: Any) -> None:
    path = lines(tmp_path / "a.jsonl", 4)
    words = ["--tokenizer", str(own.path), "--out", str(tmp_path / "data"), "--source", f"chat={path}"]
    assert main([*words, "--held-out", "2"]) == 2
    assert "--held-out is 2.0" in capsys.readouterr().err


def test_a_vocabulary_with_holes_is_as_large_as_its_largest_token(own: ChatWords, tmp_path: Path) -> None:
    found = json.loads(own.path.read_text())
    vocabulary = found["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 349  # numbers 299 to 348 are nobody's
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    path, words = lines(tmp_path / "a.jsonl", 2), read_words(tmp_path / "tokenizer.json")
    write_chat_source(tmp_path / "data", "chat", ChatFiles(train=[path], valid=[path]), words)
    assert Catalogue.open([tmp_path / "data"]).vocabulary.vocab_size == 350


def test_a_conversation_that_is_too_long_is_named_by_file_and_line(own: ChatWords, tmp_path: Path) -> None:
    bad = {3: {"text": "x"}, 9: {"text": "x"}}
    train = [lines(tmp_path / "a.jsonl", 6, {3: bad[3]}), lines(tmp_path / "b.jsonl", 12, bad)]
    files = ChatFiles(train=train, valid=[lines(tmp_path / "c.jsonl", 2)], skips_bad_rows=True)
    write_chat_source(tmp_path / "data", "chat", files, own, shard_bytes=200)
    folder = tmp_path / "data" / "chat"
    where = [f"{train[0]}:{n}" for n in (1, 2, 4, 5, 6)] + [
        f"{train[1]}:{n}" for n in (1, 2, 4, 5, 6, 7, 8, 10, 11, 12)
    ]
    assert [line_of(folder, "train", number) for number in range(15)] == where
    assert len(json.loads((folder / "train-origins.json").read_text())) == 5
    run = load_run_config(
        ["+experiment=tiny", "run.name=t", "stage=sft", f"data.path={tmp_path / 'data'}", "model.seq_length=16",
         f"model.vocab_size={own.tokenizer.vocab_size}"]
    )  # fmt: skip
    with pytest.raises(DataError, match=r"train conversations have more tokens .*/b\.jsonl:12\."):
        check_data(run)
    (folder / "train-origins.json").unlink()
    with pytest.raises(DataError, match=r"number \d+ of .*train-\d+\.bin"):
        check_data(run)


def test_what_ends_a_text_is_never_read_out_of_one_whatever_its_file_says(own: ChatWords, tmp_path: Path) -> None:
    stored = json.loads(own.path.read_text())
    stored["added_tokens"][0]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    path = lines(tmp_path / "a.jsonl", 4, {2: {"messages": [
        {"role": "user", "content": "<|endoftext|>"}, {"role": "assistant", "content": "x"}]}})  # fmt: skip
    words = read_words(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"a\.jsonl:2, message 0: its content has <\|endoftext\|>"):
        write_chat_source(tmp_path / "data", "chat", ChatFiles(train=[path], valid=[path]), words)


def test_a_tokenizer_of_another_end_token_ends_its_turns_with_that(own: ChatWords, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(own.path.read_text().replace("<|endoftext|>", "</s>"))
    words, path = read_words(tmp_path / "tokenizer.json"), lines(tmp_path / "a.jsonl", 4)
    write_chat_source(tmp_path / "data", "chat", ChatFiles(train=[path], valid=[path]), words)
    kept = read_words(tmp_path / "data" / "tokenizer")
    assert kept.eos_id == own.eos_id and dict(kept.template.special)["eos_token"] == "</s>"
    (tmp_path / "tokenizer.json").write_text(own.path.read_text().replace("<|endoftext|>", "<|none|>"))
    with pytest.raises(DataError, match=r"has no token of <\|endoftext\|>, </s>"):
        read_words(tmp_path / "tokenizer.json")
