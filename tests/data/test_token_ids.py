"""A token that the vocabulary has not is refused before it is in a batch; its file, document and sample are named."""

import shutil
from pathlib import Path

import pytest

from gpt4moe.data.check import check_data
from gpt4moe.data.loader import SampleStream, build_data
from gpt4moe.data.lookup import origin_of
from gpt4moe.data.rows import RowSamples
from gpt4moe.data.tokenizer import Tokenizer
from gpt4moe.errors import DataError
from tests.data.conftest import SEQ_LENGTH, VOCAB_SIZE, small_run
from tests.data.test_conversations import LENGTHS, SFT, chat_folder
from tests.numbered_lines import plant_token


def read_all(stream: SampleStream, count: int) -> None:
    for n in range(count):
        stream.micro_batches(n, global_batch_size=1, micro_batch_size=1, dp=1, dp_index=0)


def test_of_text_the_file_the_document_and_the_sample_are_named(in_shards: Path) -> None:
    run = small_run(in_shards, "+data.sources.alpha=1")
    plant_token(in_shards / "alpha", "train-00001", 5, VOCAB_SIZE)
    data = build_data(run)
    with pytest.raises(DataError) as raised:
        read_all(data.train, 200)
    cause = raised.value.cause
    assert f"has the token {VOCAB_SIZE}, but model.vocab_size={VOCAB_SIZE}" in cause and "rank 0 of 1" in cause
    assert f"source alpha, {in_shards}/alpha/train-00001.bin, token 5 (document 0, its token 5)" in cause
    assert raised.value.exit_code == 2 and "tools/mixture.py verify" in raised.value.cure


def test_one_such_token_slows_no_step_that_has_it_not(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All samples here are of one block, whose largest token is the planted one."""
    folder, read = shutil.copytree(data_folder, tmp_path / "copy"), SampleStream.sample
    plant_token(folder / "alpha", "train-00000", 5, VOCAB_SIZE)
    stream, alone = build_data(small_run(folder, "+data.sources.alpha=1")).train, []
    monkeypatch.setattr(SampleStream, "sample", lambda self, n: alone.append(n) or read(self, n))
    with pytest.raises(DataError, match=r"Sample (\d+),") as error:
        read_all(stream, 1000)
    assert alone == [int(error.value.cause.split()[1].strip(","))] and alone[0] > 0


def test_of_held_out_text_too(in_shards: Path) -> None:
    plant_token(in_shards / "alpha", "valid-00000", 0, 65535)
    with pytest.raises(DataError, match=r"valid-00000\.bin, token 0 "):
        read_all(build_data(small_run(in_shards, "+data.sources.alpha=1")).validation, 200)


def test_of_conversations_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "chats", tokenizer, LENGTHS)
    data = build_data(small_run(folder, *SFT[:1]))
    rows = data.train.samples
    assert isinstance(rows, RowSamples)
    stream = rows.sources["chat"]
    for index in range(stream.num_rows):  # each token of a row is where it is said to be
        sample = stream.row(index)
        real = sample.num_tokens if sample.num_tokens is not None else SEQ_LENGTH
        for at in range(real):
            tokens, position = stream.token(index, at)
            assert tokens[position : position + 1][0] == sample.tokens[at]
    plant_token(folder / "chat", "train-1", 7, 400)
    with pytest.raises(DataError, match=r"train-1.bin, token 7 \(document"):
        read_all(build_data(small_run(folder, *SFT[:1])).train, 100)


def test_the_first_token_of_a_sample_is_found_as_before(data_folder: Path, tmp_path: Path) -> None:
    run = small_run(shutil.copytree(data_folder, tmp_path / "copy"), "+data.sources.beta=1")
    data = build_data(run)
    origin, _ = origin_of(run, check_data(run), 3)
    assert data.train.samples.origin(3, 0).startswith(f"source beta, {origin.file}, token ")
    assert f"(document {origin.document:,}, its token {origin.token_in_document:,})" in data.train.samples.origin(3, 0)
