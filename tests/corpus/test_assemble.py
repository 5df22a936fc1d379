"""Shards are those that Megatron's own builder writes, byte by byte."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gpt4moe.corpus import command
from gpt4moe.data.folder import held_out
from gpt4moe.data.preprocess import SourceText, write_data_folder
from tests.corpus.conftest import TEXTS, files_of, write_lines


@pytest.mark.parametrize("shard_bytes", [1, 1000, 5000, 4_000_000_000])
def test_shards_equal_those_of_megatron_s_builder(
    make: Callable[..., int], tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    texts = TEXTS[:60] if shard_bytes == 1 else TEXTS
    order = command.Order
    monkeypatch.setattr(command, "Order", lambda **given: order(**given, shard_bytes=shard_bytes, piece_bytes=3000))
    path = write_lines(tmp_path / "a.jsonl", texts)
    assert make(f"--source=a={path}", "--held-out=0.2") == 0
    split = {share: [text for text in texts if held_out(text, 0.2) == share] for share in (True, False)}
    source = SourceText(train=split[False], valid=split[True], licence="", description="")
    write_data_folder(tmp_path / "b", {"a": source}, tokenizer_path, lambda n: None, shard_bytes=shard_bytes)
    found, expected = files_of(tmp_path / "out" / "a"), files_of(tmp_path / "b" / "a")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == ["manifest.json"]
