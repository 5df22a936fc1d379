"""Conversions of a model larger than the memory they may take: what they hold, and what kill -9 leaves of them."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
import torch

from benchmarks.checkpoints import ALLOWED_BYTES, SHAPE, save_checkpoint
from benchmarks.harness.process import measured
from gpt4moe.architecture.tensors import logical_shapes
from gpt4moe.config.load import load_run_config
from gpt4moe.convert.verify import verify


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """0.8 GB of weights, more than twice what a conversion may hold; all tensors show parts of one block of noise."""
    run = load_run_config([*SHAPE, "model.num_layers=2"])
    shapes = logical_shapes(run.model)
    assert 4 * sum(map(prod, shapes.values())) > 2 * ALLOWED_BYTES
    noise = torch.randn(max(map(prod, shapes.values())))
    folder = tmp_path_factory.mktemp("large") / "step-00000001"
    save_checkpoint(folder, run, {name: noise[: prod(shape)].view(shape) for name, shape in shapes.items()})
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("options", [["to-hf"], ["to-inference", "--tp", "4", "--pp", "2"]], ids=lambda o: o[0])
def test_a_conversion_holds_two_slices_and_300_mb(options: list[str], large: Path, tmp_path: Path) -> None:
    arguments = ["tools/convert_checkpoint.py", options[0], str(large), str(tmp_path / "out"), *options[1:]]
    assert measured(*arguments).peak_bytes - measured("-c", "import numpy").peak_bytes <= ALLOWED_BYTES
    shutil.rmtree(tmp_path / "out")


def test_after_kill_9_the_same_command_goes_on_and_ends_whole(large: Path, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, "tools/convert_checkpoint.py", "to-hf", str(large), str(out), "--max-shard-size", "20MB"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(partial.glob("*.done.json")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not out.exists()
    kept = [path.name.removesuffix(".done.json") for path in partial.glob("*.done.json")]
    written = {name: (partial / name).stat().st_mtime_ns for name in kept}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == written, "finished files are not written again"
    assert not partial.exists()
    answer = verify(large, out)
    assert answer["compared"] > 15 and not answer["different"] and not answer["only_in_a"] + answer["only_in_b"]
    shutil.rmtree(out)
