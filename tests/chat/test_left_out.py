"""Small sets, bad lines and conversations where they do not belong: each is told with its numbers and its cure."""

import json
from pathlib import Path
from typing import Any

import pytest

from gpt4moe.chat.source import ChatFiles, write_chat_source
from gpt4moe.chat.words import ChatWords
from gpt4moe.config.load import load_run_config
from gpt4moe.data.check import check_data
from gpt4moe.data.command import answer
from gpt4moe.errors import DataError
from gpt4moe.launch.rank_files import data_files
from gpt4moe.parallel.environment import Environment
from gpt4moe.training.launch import check
from gpt4moe.training.run_folder import RunFolder
from tests.chat.test_source import lines
from tools.prepare_chat import main


def test_a_small_set_is_told_which_share_to_hold_out(own: ChatWords, tmp_path: Path, capsys: Any) -> None:
    path = lines(tmp_path / "a.jsonl", 12)
    words = ["--tokenizer", str(own.path), "--out", str(tmp_path / "data"), "--source", f"chat={path}"]
    assert main([*words, "--held-out", "0"]) == 2
    told = capsys.readouterr().err
    assert (
        "Source chat has no conversation for valid (12 for train, 0 for valid): --held-out 0 of 12 chose none." in told
    )
    assert "set --held-out 0.42, or name held-out files: --valid chat=FILE." in told
    assert main([*words, "--held-out", "0.42"]) == 0
    assert main([*words, "--held-out", "1"]) == 2
    assert "for train (0 for train, 12 for valid): --held-out 1 of 12 chose all." in capsys.readouterr().err


def test_a_source_whose_lines_are_all_bad_says_why(own: ChatWords, tmp_path: Path, capsys: Any) -> None:
    path = lines(tmp_path / "a.jsonl", 3, {number: {"text": "x"} for number in (1, 2, 3)})
    words = ["--tokenizer", str(own.path), "--out", str(tmp_path / "data"), "--source", f"chat={path}"]
    assert main([*words, "--bad-rows", "skip"]) == 2
    told = capsys.readouterr().err
    assert "(0 for train, 0 for valid, 3 left out: " in told and "a.jsonl:1 has neither messages nor" in told


def test_a_list_of_what_was_left_out_ends_and_its_count_does_not(
    own: ChatWords, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt4moe.data.folder.LISTED", 2)
    path = lines(tmp_path / "a.jsonl", 9, {number: {"text": "x"} for number in (2, 4, 5, 7)})
    files = ChatFiles(train=[path], valid=[lines(tmp_path / "b.jsonl", 2)], skips_bad_rows=True)
    assert write_chat_source(tmp_path / "data", "chat", files, own).skipped.count == 4
    listed = [json.loads(line) for line in (tmp_path / "data" / "chat" / "skipped.jsonl").read_text().splitlines()]
    assert [one.get("where") for one in listed[:2]] == [f"{path}:2", f"{path}:4"] and listed[2:] == [{"not_listed": 2}]


def test_a_byte_order_mark_is_no_part_of_the_first_line(own: ChatWords, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", 3)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    count = write_chat_source(tmp_path / "data", "chat", ChatFiles(train=[path], valid=[path]), own)
    assert count.splits["train"].conversations == 3


@pytest.fixture
def chat_folder(own: ChatWords, tmp_path: Path) -> Path:
    path = lines(tmp_path / "a.jsonl", 9)
    write_chat_source(tmp_path / "data", "chat", ChatFiles(train=[path], valid=[path]), own)
    return tmp_path / "data"


def run_on(folder: Path, own: ChatWords, *overrides: str) -> Any:
    size = f"model.vocab_size={own.tokenizer.vocab_size}"
    return load_run_config(["+experiment=tiny", "run.name=t", f"data.path={folder}", size, *overrides])


def test_pretraining_learns_conversations_only_where_it_is_told_to(own: ChatWords, chat_folder: Path) -> None:
    run = run_on(chat_folder, own, "model.seq_length=16")
    with pytest.raises(
        DataError, match=r"stage=pretrain, and source chat has conversations: .* the user's too"
    ) as error:
        check_data(run)
    assert "stage=sft" in error.value.cure and "data.chat_as_text=true" in error.value.cure
    assert check_data(run_on(chat_folder, own, "model.seq_length=16", "data.chat_as_text=true")).source_names == [
        "chat"
    ]


def test_a_run_that_began_before_conversations_were_refused_goes_on_and_is_looked_at(
    own: ChatWords, chat_folder: Path, tmp_path: Path
) -> None:
    run = run_on(chat_folder, own, "model.seq_length=16", f"run.root={tmp_path}")
    for look in (data_files, lambda new: check(new, Environment.detect())):
        with pytest.raises(DataError, match="the user's too"):
            look(run)
    folder = RunFolder.of(run)
    folder.path.mkdir()
    folder.freeze(run, check_data(run, is_new=False).identity)
    folder.metrics.write_text('{"step": 1}\n')
    assert "the user's too" in check(run, Environment.detect()).data.warnings[0]
    assert any(file.name.startswith("train-") for file in data_files(run))
    words = ["+experiment=tiny", f"data.path={chat_folder}", f"model.vocab_size={own.tokenizer.vocab_size}"]
    assert answer("sample", ["0", *words, "model.seq_length=16"]).facts["source"] == "chat"


def test_a_missing_file_of_conversations_names_the_command_that_makes_them(own: ChatWords, chat_folder: Path) -> None:
    (chat_folder / "chat" / "train-mask-00000.bin").unlink()
    with pytest.raises(DataError, match=r"train-mask-00000\.bin is missing") as error:
        check_data(run_on(chat_folder, own, "stage=sft"))
    assert "tools/prepare_chat.py" in error.value.cure


def test_a_cut_that_leaves_nothing_to_learn_says_so(own: ChatWords, chat_folder: Path) -> None:
    with pytest.raises(DataError, match=r"data\.long_rows=cut leaves nothing of 9 train conversations") as error:
        check_data(run_on(chat_folder, own, "stage=sft", "model.seq_length=4", "data.long_rows=cut"))
    assert "data.long_rows=split" in error.value.cure
