"""Data that is not there or does not fit is refused at the door, with numbers and a cure; identity follows content."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt4moe.config.run import RunConfig
from gpt4moe.data import shards
from gpt4moe.data.check import check_data
from gpt4moe.data.loader import build_data
from gpt4moe.data.manifest import Shard
from gpt4moe.errors import DataError
from tests.data.conftest import small_run


@pytest.fixture
def copied(data_folder: Path, tmp_path: Path) -> Path:
    """A data folder that a test may damage."""
    return Path(shutil.copytree(data_folder, tmp_path / "data"))


def refusal(folder: Path | None, *overrides: str) -> DataError:
    with pytest.raises(DataError) as raised:
        check_data(small_run(folder, *overrides))
    assert "\n" not in raised.value.cause
    assert "\n" not in raised.value.cure
    return raised.value


def test_good_data_passes(data_folder: Path) -> None:
    check_data(small_run(data_folder))


def test_a_folder_beside_the_sources_that_may_not_be_read_is_none(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data folder that is a disk of its own has lost+found, which only root may read."""
    (copied / "lost+found").mkdir()
    stat = os.stat

    def of_others(path: Any, **how: Any) -> os.stat_result:
        if "lost+found/" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **how)

    monkeypatch.setattr(os, "stat", of_others)
    check_data(small_run(copied))


def test_a_missing_folder_names_make_data(tmp_path: Path) -> None:
    error = refusal(tmp_path / "nowhere")
    assert "nowhere does not exist" in error.cause
    for command in ("make data", "tokenize_corpus.py", "prepare_chat.py", "prepare_media.py", "data=mock"):
        assert command in error.cure


def test_a_folder_left_half_made_has_no_manifest(copied: Path) -> None:
    (copied / "manifest.json").unlink()
    assert "has no manifest.json" in refusal(copied).cause


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', '{"format": 1}'])
def test_a_foreign_manifest_is_refused(copied: Path, content: str) -> None:
    (copied / "manifest.json").write_text(content)
    assert "no data manifest of format 2" in refusal(copied).cause


def test_another_vocabulary_names_both_numbers(data_folder: Path) -> None:
    error = refusal(data_folder, "model.vocab_size=512")
    assert "512" in error.cause
    assert "300" in error.cause
    assert "model.vocab_size=300" in error.cure


def test_a_source_that_is_not_there_lists_those_that_are(data_folder: Path) -> None:
    error = refusal(data_folder, "+data.sources.gamma=1")
    assert "gamma" in error.cause
    assert "alpha, beta" in error.cure


def test_a_source_shorter_than_one_sample_names_both_lengths(data_folder: Path) -> None:
    assert "takes 4097" in refusal(data_folder, "model.seq_length=4096").cause


def test_a_source_of_weight_zero_may_be_too_short_and_even_absent(copied: Path) -> None:
    (copied / "beta" / "train-00000.bin").unlink()
    check_data(small_run(copied, "+data.sources.alpha=1", "+data.sources.beta=0"))


@pytest.mark.parametrize(
    "name", ["alpha/train-00000.bin", "beta/valid-00000.idx", "beta/train-00000.sums", "tokenizer.json"]
)
def test_a_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    error = refusal(copied)
    assert f"{name} is missing" in error.cause and "Restore" in error.cure


def test_files_of_another_build_than_the_manifest_are_found_out(copied: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(copied / f"beta/train-00000{suffix}", copied / f"alpha/train-00000{suffix}")
    assert "the manifest says" in refusal(copied).cause


def test_another_tokenizer_than_the_datas_own_is_refused(data_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text((data_folder / "tokenizer.json").read_text() + " ")
    assert "is not the one that made the data" in refusal(data_folder, f"data.tokenizer={other}").cause


def data_identity(run: RunConfig) -> dict[str, str]:
    return check_data(run).identity


def test_identity_stays_when_the_folder_moves(data_folder: Path, copied: Path) -> None:
    assert data_identity(small_run(data_folder)) == data_identity(small_run(copied))


def test_identity_changes_with_the_shares(data_folder: Path) -> None:
    even, uneven = (
        data_identity(small_run(data_folder, "+data.sources.alpha=1", f"+data.sources.beta={weight}"))
        for weight in (1, 2)
    )
    assert even["data"] != uneven["data"]
    assert even["tokenizer"] == uneven["tokenizer"]


def test_identity_changes_with_the_tokens(data_folder: Path, copied: Path) -> None:
    manifest = json.loads((copied / "alpha" / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["train"][0]["bin_sha256"] = "0" * 64
    (copied / "alpha" / "manifest.json").write_text(json.dumps(manifest))
    assert data_identity(small_run(data_folder))["data"] != data_identity(small_run(copied))["data"]


def test_synthetic_data_has_an_identity_of_its_own() -> None:
    assert data_identity(small_run(None)) == {"data": "mock", "tokenizer": "none"}


def test_the_check_needs_no_torch() -> None:
    script = (
        "import sys, gpt4moe.data.check, gpt4moe.data.tokenizer, gpt4moe.data.samples; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).resolve().parents[2])


def test_each_shard_is_looked_at_once_a_launch(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """13T tokens are thousands of shards of three files, each a question to the file system."""
    looked, require = [], shards.require_files

    def counted(folder: Path, one: Shard, made_by: str) -> None:
        looked.append((folder.name, one.file))
        require(folder, one, made_by)

    monkeypatch.setattr(shards, "require_files", counted)
    run = small_run(data_folder)
    build_data(run, check_data(run)).train.sample(0)
    assert sorted(looked) == [(name, f"{split}-00000") for name in ("alpha", "beta") for split in ("train", "valid")]
