"""Checkpoints on disk: save, load and convert in GB/s, beside cp, torch and transformers, all with fsync.

    python -m benchmarks.checkpoints                                  1 GB of fp32 weights
    python -m benchmarks.checkpoints --gigabytes 8 --convert-only     time and memory of conversions alone

The model has Mixtral's shape; its checkpoint is cut as the sharded optimizer of four ranks cuts it. Files leave the
page cache before they are read. All contenders end writing with fsync. torch.distributed.checkpoint loads into tensors
that are there, as a run does, and hashes nothing. Targets: a load takes at most 1.25 times as long as its, a conversion
at most 1.25 times as long as `cp` of its output, with anonymous memory of at most 300 MB plus twice the largest slice
above the interpreter's.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as torch_checkpoint

from benchmarks.harness.process import machine, measured
from gpt4moe.architecture.tensors import logical_shapes
from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.reader import CheckpointReader
from gpt4moe.checkpoint.storage import FileEntry, Piece
from gpt4moe.checkpoint.writing import write_file
from gpt4moe.config.load import config_to_dict, load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.shard import Shard, flat_rectangles

RANKS = 4
LAYER_BYTES = 365e6
SHAPE = (
    "+experiment=tiny", "run.name=benchmark", "data=mock", "model.hidden_size=1024", "model.num_attention_heads=16",
    "model.num_query_groups=4", "model.vocab_size=8192", "model.moe.num_experts=8", "model.moe.ffn_hidden_size=3584",
)  # fmt: skip
LARGEST_SLICE_BYTES = 4 * 1024 * 3584  # one expert's gate: all others are smaller or as small as a chunk
ROUNDS, LOADS = 3, 5  # in turns with the peer: what a disk gives changes by the minute
ALLOWED_FACTOR, ALLOWED_BYTES = 1.25, 300e6 + 2 * LARGEST_SLICE_BYTES
BY_TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2])
"""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of fp32 weights (default 1)")
    parser.add_argument(
        "--convert-only", action="store_true", help="conversions alone, of weights that repeat themselves"
    )
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary one)")
    given = parser.parse_args(arguments)
    layers = max(1, round(given.gigabytes * 1e9 / LAYER_BYTES))
    run = load_run_config([*SHAPE, f"model.num_layers={layers}"])
    shapes = logical_shapes(run.model)
    size = 4 * sum(map(prod, shapes.values()))
    print(f"{size / 1e9:.2f} GB of fp32 weights, {layers} layers. {machine()}")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        root = Path(folder)
        if given.convert_only:
            # One block of noise, seen by every tensor: nothing of the model's size is in memory here.
            noise = torch.randn(max(map(prod, shapes.values())))
            save_checkpoint(
                root / "step-00000001", run, {name: noise[: prod(shape)].view(shape) for name, shape in shapes.items()}
            )
        else:
            _measure_peers(root, run, {name: torch.randn(shape) for name, shape in shapes.items()}, size)
        interpreter = measured("-c", "import numpy").peak_bytes
        for command, options in {"to-hf": ["--dtype", "bf16"], "to-inference": ["--tp", "4", "--pp", "1"]}.items():
            arguments = [command, str(root / "step-00000001"), str(root / "out"), *options]
            _measure_conversion(root, arguments, size // 2, interpreter, with_peer=not given.convert_only)


def _measure_peers(root: Path, run: RunConfig, state: dict[str, torch.Tensor], size: int) -> None:
    """Saving and loading of the whole state, which is dropped at the end."""
    ours, folder = root / "step-00000001", root / "d"
    _report("save  gpt4moe, hashed", size, lambda: save_checkpoint(ours, run, state))
    _report("      safetensors", size, lambda: _synced(root / "s", lambda path: save_file(state, path)))
    _report("      torch.save", size, lambda: _synced(root / "t", lambda path: torch.save(state, path)))
    writer = torch_checkpoint.FileSystemWriter(folder, sync_files=True)
    _report(
        "      torch.distributed.checkpoint",
        size,
        lambda: torch_checkpoint.save(state, storage_writer=writer, no_dist=True),
    )
    _report("      cp", size, lambda: _copy([root / "s"], root / "copy"), root / "s")
    _report("load  gpt4moe, verified", size, lambda: _load(ours), ours)
    _report("      safetensors", size, lambda: _read(load_file(root / "s")), root / "s")
    _report("      torch.load", size, lambda: _read(torch.load(root / "t")), root / "t")
    torch_reader = torch_checkpoint.FileSystemReader(folder)
    for where, is_cold in (("from disk", True), ("from the page cache", False)):
        ratios = []
        for _ in range(LOADS):
            cold, their_cold = (ours, folder) if is_cold else (None, None)
            verified = _report(f"into tensors, verified, {where}", size, lambda: _load(ours, state), cold)
            unverified = _report(
                "      torch.distributed.checkpoint", size,
                lambda: torch_checkpoint.load(state, storage_reader=torch_reader, no_dist=True), their_cold,
            )  # fmt: skip
            ratios.append(verified / unverified)
        ratio = median(ratios)
        _judge(f"{ratio:.2f} times torch.distributed.checkpoint (at most {ALLOWED_FACTOR})", ratio <= ALLOWED_FACTOR)
    state.clear()
    for path in ("s", "t"):
        (root / path).unlink()
    for path in ("copy", "d"):
        shutil.rmtree(root / path)


def _measure_conversion(root: Path, command: list[str], size: int, interpreter: int, *, with_peer: bool) -> None:
    peaks: list[int] = []
    ratios = []
    run, out, target = ["tools/convert_checkpoint.py", *command], root / "out", root / "copy"
    for _ in range(ROUNDS):
        shutil.rmtree(out, ignore_errors=True)
        ours = _report(f"{command[0]}, bf16", size, lambda: peaks.append(measured(*run).peak_bytes), Path(command[1]))
        files = sorted(out.iterdir())
        cp = _report("      cp of its output", size, partial(_copy, files, target), out)
        ratios.append(ours / cp)
        shutil.rmtree(target)
    ratio, memory = median(ratios), max(peaks) - interpreter
    _judge(f"{ratio:.2f} times cp (at most {ALLOWED_FACTOR})", ratio <= ALLOWED_FACTOR)
    allowed = f"at most {ALLOWED_BYTES / 1e6:.0f}"
    _judge(f"{memory / 1e6:.0f} MB of anonymous memory ({allowed})", memory <= ALLOWED_BYTES)
    if with_peer and command[0] == "to-hf":
        _report("      transformers, load + save", size, lambda: _by_transformers(root / "out", target), root / "out")
        shutil.rmtree(target)
    shutil.rmtree(root / "out")


def _by_transformers(source: Path, target: Path) -> None:
    measured("-c", BY_TRANSFORMERS, str(source), str(target))
    for file in target.iterdir():
        _sync(file)


def _report(what: str, size: int, do: Callable[[], object], cold: Path | None = None) -> float:
    if cold is not None:
        _forget(cold)
    begin = time.perf_counter()
    do()
    seconds = time.perf_counter() - begin
    print(f"{what:<44} {seconds:7.1f} s  {size / seconds / 1e9:6.3f} GB/s", flush=True)
    return seconds


def _judge(what: str, is_reached: bool) -> None:
    print(f"      {what}: {'reached' if is_reached else 'NOT reached'}")


def save_checkpoint(folder: Path, run: RunConfig, state: dict[str, torch.Tensor]) -> None:
    """Writes a checkpoint as RANKS ranks of a sharded optimizer would: each a flat range of every tensor."""
    folder.mkdir()
    entries: list[FileEntry] = []
    for rank in range(RANKS):
        pieces = []
        for name, tensor in state.items():
            start, end = (tensor.numel() * index // RANKS for index in (rank, rank + 1))
            for part in flat_rectangles(start, end, tuple(tensor.shape)):
                values = tensor.view(-1)[part.start : part.start + prod(part.shape)]
                pieces.append(Piece(f"weight/{name}", tuple(tensor.shape), part.offset, part.shape, values))
        entries.append(write_file(folder / f"rank-{rank:05d}.safetensors", pieces))
    Manifest(
        step=1, consumed_samples=0, consumed_per_source={}, optimizer_step=1, run_id="benchmark", identity={},
        config=config_to_dict(run), layout="benchmark", versions={}, files=entries,
    ).save(folder)  # fmt: skip


def _load(folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Into tensors of its own, or into those of `state`, all in one call, as model.weights.load_weights does."""
    reader = CheckpointReader(folder)
    targets = []
    for name, shape in reader.shapes.items():
        out = torch.empty(shape) if state is None else state[name.removeprefix("weight/")]
        targets.append((name, Shard(name, shape, (0,) * len(shape), shape), 0, out.numel(), out.view(-1)))
    reader.fill_all(targets)


def _synced(path: Path, write: Callable[[Path], object]) -> None:
    write(path)
    _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _copy(files: list[Path], folder: Path) -> None:
    folder.mkdir()
    subprocess.run(["cp", "--reflink=never", *files, folder], check=True)
    for file in folder.iterdir():
        _sync(file)


def _read(state: dict[str, torch.Tensor]) -> None:
    """Touches every page: a loader may only have mapped the file."""
    for tensor in state.values():
        tensor.sum()


def _forget(path: Path) -> None:
    """Drops a file's, or a folder's files', clean pages from the cache."""
    for file in [path] if path.is_file() else path.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main(sys.argv[1:])
