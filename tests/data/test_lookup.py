"""tools/mixture.py: where a sample comes from, what a run reads, whether files are whole."""

import hashlib
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from gpt4moe.data.loader import build_data
from tests.data.conftest import SEQ_LENGTH, small_run
from tests.data.mixture_tool import RUN, answer
from tools.mixture import main


def test_a_sample_is_in_the_file_and_document_that_are_named(
    in_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = build_data(small_run(in_shards, "training.steps=3"))
    files = set()
    for n in range(0, 60, 7):
        origin = answer(capsys, "sample", str(n), *RUN, f"data.path={in_shards}")
        tokens = data.train.sample(n).tokens
        assert origin["tokens_md5"] == hashlib.md5(tokens.astype("<i8").tobytes()).hexdigest()
        dataset = IndexedDataset(origin["file"].removesuffix(".bin"))  # its documents live no longer than it does
        rest = dataset[origin["document"]][origin["token_in_document"] :]
        assert rest[: SEQ_LENGTH + 1].tolist() == tokens[: len(rest)].tolist()
        files.add(origin["file"])
    assert len(files) > 3


def test_a_sample_is_shown_as_text(in_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "3", *RUN, f"data.path={in_shards}"]) == 0
    shown = capsys.readouterr().out
    assert "document" in shown
    assert " other things" in shown


def test_whole_files_pass_and_each_damage_is_named(in_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "verify", str(in_shards))
    assert found["problems"] == []
    assert found["shards"] > 6
    for name, words in (("alpha/train-00001.bin", "are not those"), ("beta/valid-00000.idx", "not the index")):
        path = in_shards / name
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[-4] ^= 1
        path.write_bytes(flipped)
        (problem,) = answer(capsys, "verify", str(in_shards), status=1)["problems"]
        assert name in problem
        assert words in problem
        path.write_bytes(content)
    sums = in_shards / "alpha" / "train-00000.sums"
    sums.write_bytes(bytes(len(sums.read_bytes())))
    problems = answer(capsys, "verify", str(in_shards), status=1)["problems"]
    for problem, suffix in zip(problems, ("idx", "bin"), strict=True):
        assert "train-00000.sums has other sums than" in problem and problem.endswith(f"train-00000.{suffix}.")
