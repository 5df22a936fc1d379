"""tools/convert_checkpoint.py as a person calls it."""

import json
from pathlib import Path

import pytest

from tests.convert.conftest import SHAPE
from tests.convert.test_bad_input import convert
from tests.training.command import train


def test_the_whole_way_with_logits(tmp_path: Path, trained: Path) -> None:
    hf, prompts = tmp_path / "hf", tmp_path / "prompts.txt"
    prompts.write_text("word 1 and\nother things\n")
    planned = convert("to-hf", trained, hf, "--dtype", "fp32", "--max-shard-size", "100KB", "--dry-run", "--json")
    assert planned.returncode == 0 and not hf.exists()
    done = convert("to-hf", trained, hf, "--dtype", "fp32", "--max-shard-size", "100KB")
    assert done.returncode == 0 and "GB/s" in done.stdout
    assert sorted(path.name for path in hf.glob("*.safetensors")) == [
        file["name"] for file in json.loads(planned.stdout)["files"]
    ]
    assert convert("verify", trained, hf).returncode == 0
    # No tolerance at all: sums in another order show, and nothing else.
    compared = convert("verify", trained, hf, "--prompts", prompts, "--logits-tolerance", 0, "--json")
    answer = json.loads(compared.stdout)
    assert compared.returncode == 1 and answer["different"] == []
    assert answer["logits"]["prompts"] == 2 and 0 < answer["logits"]["max_abs"] < 1e-4


def test_logits_of_a_bf16_run_and_of_a_bf16_export_are_compared_in_fp32(tmp_path: Path) -> None:
    (ended,) = train(tmp_path / "run", *SHAPE, "precision=bf16")
    assert ended.status == 0, ended.err
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("17 4 201 7\n3 3 9\n")
    for dtype in ("fp32", "bf16"):
        assert convert("to-hf", tmp_path / "run", tmp_path / dtype, "--dtype", dtype).returncode == 0
        compared = convert("verify", tmp_path / "run", tmp_path / dtype, "--prompts", prompts, "--json")
        answer = json.loads(compared.stdout)
        assert compared.returncode == 0 and answer["rounded_to_bf16"] == (dtype == "bf16")
        assert 0 < answer["logits"]["max_abs"] < 1e-4


def test_upcycling_and_verify_say_what_differs(tmp_path: Path, mixtral: Path, trained: Path) -> None:
    refused = convert("from-hf", mixtral, tmp_path / "ours", "--upcycle-experts", 8)
    assert refused.returncode == 2 and "is a mixture already" in refused.stderr
    assert convert("from-hf", mixtral, tmp_path / "ours").returncode == 0
    differs = convert("verify", tmp_path / "ours", trained)
    assert differs.returncode == 1 and "tensors differ" in differs.stdout


@pytest.mark.parametrize("given", ["big", "0.0000001"])
def test_a_size_that_is_none_is_refused(given: str, tmp_path: Path) -> None:
    ended = convert("to-hf", tmp_path / "run", tmp_path / "hf", "--max-shard-size", given)
    assert ended.returncode == 2 and f"'{given}' is no size" in ended.stderr
