"""Seconds, memory and open files from the start of a process to its first batch: 13T tokens, and beside Megatron-core.

    python -m benchmarks.data

13T tokens are sparse files, so every shard is there in number, name and size, and reads as zeros; its index has a
document of 1,000 tokens after the other. "Apart": attention stays inside documents (data.document_mask), so blocks of
indexes are read too, each checked against its sum. Target: 1 second and 200 MB beyond the imports, at the peak.
Megatron-core's GPTDataset builds its indexes on the same files as ours; its line to 13T is drawn through the two
largest.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.harness.command import read_options
from benchmarks.harness.process import machine, peak_bytes, reset_peak
from benchmarks.harness.token_files import megatron_dataset, registered, sparse_file, tokenizer_file, write_pair

TARGET_SECONDS, TARGET_BYTES = 1.0, 200e6
DOCUMENTS = (10**6, 10**7, 10**8)
DOCUMENT_TOKENS = 64
DOCUMENT_BYTES = 4000
"""Of 13T tokens."""
SAMPLES_OF_13T = 13e12 / 4096
CLOCKS = {"seconds": time.perf_counter, "processor seconds": time.process_time}


def main(arguments: list[str]) -> None:
    is_shared = read_options(__doc__, arguments, shared="measure CPU time: others use this machine").shared
    clock = "processor seconds" if is_shared else "seconds"
    print(f"From the start of the data to the first batch, in {clock}. {machine()}\n")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        _thirteen_trillion(folder, clock)
        _beside_megatron(folder, clock)


def _thirteen_trillion(folder: Path, clock: str) -> None:
    shards, documents = _sparse_13t(folder / "13t")
    words = ["+experiment=gpt4", f"data.path={folder / '13t'}"]
    found = [_child("ours", clock, *words, *more) for more in ([], ["data.document_mask=true"])]
    print(f"13T tokens: {shards:,} shards of {found[0]['disk_bytes'] / 1e12:.0f} TB, {documents / 1e9:.1f}e9 documents")
    print(f"  {clock} to open, to a rank's first batch ({found[0]['samples']} x 8192 tokens); MB; files mapped")
    for name, one in zip(("one stream", "apart"), found, strict=True):
        print(f"    {name:<16}{one['open_seconds']:>6.2f}{one['first_batch_seconds']:>6.2f}"
              f"{one['memory_bytes'] / 1e6:>8.0f}{one['mapped_files']:>6}")  # fmt: skip
        _judge(one)


def _beside_megatron(folder: Path, clock: str) -> None:
    print(f"\nA document of {DOCUMENT_TOKENS} tokens a sample: {clock} to the first batch, MB, MB of indexes on disk")
    lines = []
    for documents in DOCUMENTS:
        name = f"d{documents}"
        pair = write_pair(
            folder / name, documents=documents, document_tokens=DOCUMENT_TOKENS, dtype="uint16", is_sparse=True
        )
        words = registered(folder, name, pair, seq_length=DOCUMENT_TOKENS)
        ours = [_child("ours", clock, *words, *more) for more in ([], ["data.document_mask=true"])]
        theirs = _child("megatron", clock, str(pair), str(documents - 1))
        lines.append((documents, theirs["open_seconds"], theirs["index_bytes"]))
        print(f"  {documents:,} documents")
        for name, found in (("one stream", ours[0]), ("apart", ours[1]), ("Megatron-core", theirs)):
            seconds = found["open_seconds"] + found.get("first_batch_seconds", 0)
            megabytes, index = found["memory_bytes"] / 1e6, found.get("index_bytes", 0) / 1e6
            print(f"    {name:<16}{seconds:>7.2f}{megabytes:>8.0f}{index:>10.1f}")
        for found in ours:
            _judge(found)
        for path in folder.glob(f"{pair.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (n0, s0, b0), (n1, s1, b1) = lines[-2:]
    more = (SAMPLES_OF_13T - n1) / (n1 - n0)
    hours, size = (s1 + (s1 - s0) * more) / 3600, (b1 + (b1 - b0) * more) / 1e9
    print(f"  Megatron-core drawn on to 13T ({SAMPLES_OF_13T / 1e9:.1f}e9 samples): {hours:.1f} h, {size:.0f} GB")


def _judge(found: dict[str, Any]) -> None:
    seconds = found["open_seconds"] + found["first_batch_seconds"]
    for target, is_reached in (
        ("1 second", seconds <= TARGET_SECONDS), ("200 MB", found["memory_bytes"] <= TARGET_BYTES)
    ):  # fmt: skip
        print(f"      target: {target}: {'reached' if is_reached else 'NOT reached'}")


def _sparse_13t(folder: Path) -> tuple[int, int]:
    """The sources of configs/data/gpt4_13t.yaml in shards of 4 GB. Returns: how many, and their documents."""
    from gpt4moe.config.checksums import file_sha256
    from gpt4moe.config.load import load_run_config
    from gpt4moe.data.indexed_writer import SHARD_BYTES
    from gpt4moe.data.manifest import DataManifest, Shard, SourceManifest

    run = load_run_config(["+experiment=gpt4", "run.name=t"])
    folder.mkdir()
    tokenizer = file_sha256(tokenizer_file(folder / "tokenizer.json"))
    count = documents = 0
    for name, source in run.data.chosen.items():
        (folder / name).mkdir()
        entries: dict[str, list[Shard]] = {}
        for split, tokens in (("train", int(source.tokens or 0)), ("valid", 10**7)):
            entries[split] = []
            for number, start in enumerate(range(0, tokens, SHARD_BYTES // 4)):
                size = 4 * min(tokens - start, SHARD_BYTES // 4)
                index, index_sha256, index_sums = _index(folder, size)
                shard = Shard(
                    file=f"{split}-{number:05}", sums=f"{split}-{number:05}.sums", documents=size // DOCUMENT_BYTES,
                    tokens=size // 4, dtype="int32", bin_sha256=f"{number:064x}", idx_bytes=index.stat().st_size,
                    idx_sha256=index_sha256, idx_blocks=len(index_sums),
                )  # fmt: skip
                sparse_file(folder / name / f"{shard.file}.bin", size)
                (folder / name / f"{shard.file}.idx").hardlink_to(index)
                _write_sums(folder, folder / name / shard.sums, size, index_sums)
                entries[split].append(shard)
                count, documents = count + 1, documents + shard.documents
        SourceManifest(tokenizer_sha256=tokenizer, licence="", description="zeros", **entries).write(folder / name)
    vocabulary = {"vocab_size": run.model.vocab_size, "eos_id": 0, "tokenizer": "tokenizer.json"}
    DataManifest(**vocabulary, tokenizer_sha256=tokenizer).write(folder)
    return count, documents


@cache
def _index(folder: Path, size: int) -> tuple[Path, str, list[int]]:
    """The index of a .bin of `size` bytes, its sha256 and sums; files of one size share it."""
    from gpt4moe.data.blocks import INDEX_BLOCK_BYTES, hash_blocks
    from gpt4moe.data.indexed_writer import write_index

    path = folder / f"documents-{size}.idx"
    write_index(path, np.full(size // DOCUMENT_BYTES, DOCUMENT_BYTES // 4), np.dtype("<i4"))
    return path, *hash_blocks(path, INDEX_BLOCK_BYTES)


def _write_sums(folder: Path, path: Path, size: int, index_sums: list[int]) -> None:
    """Of a .bin of zeros, and of its index behind them; files of one size share one."""
    import zlib

    from gpt4moe.data.blocks import BLOCK_BYTES as block

    first = folder / f"zeros-{size}.sums"
    if not first.exists():
        sums = np.full(-(-size // block), zlib.crc32(bytes(block)), dtype="<u4")
        if size % block:
            sums[-1] = zlib.crc32(bytes(size % block))
        first.write_bytes(sums.tobytes() + np.array(index_sums, dtype="<u4").tobytes())
    path.hardlink_to(first)


def _child(what: str, *words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.data", "--child", what, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _ours(clock: Callable[[], float], overrides: list[str]) -> dict[str, Any]:
    from gpt4moe.config.load import load_run_config
    from gpt4moe.data.check import check_data
    from gpt4moe.data.loader import build_data

    run = load_run_config([*overrides, "run.name=t"])
    imported, memory = clock(), reset_peak()
    checked = check_data(run)
    data = build_data(run, checked)
    opened = clock()
    dp = 208 if run.parallel.pp > 1 else 1
    batches = data.train.micro_batches(
        0, global_batch_size=run.training.global_batch_size, micro_batch_size=1, dp=dp, dp_index=0
    )
    ended, memory = clock(), peak_bytes() - memory
    mapped = {row.path for row in psutil.Process().memory_maps() if row.path.endswith((".bin", ".idx", ".sums"))}
    assert checked.catalogue is not None
    return {
        "open_seconds": opened - imported, "first_batch_seconds": ended - opened,
        "memory_bytes": memory, "mapped_files": len(mapped),
        "samples": len(batches),
        "disk_bytes": 4 * sum(checked.catalogue.train_tokens().values()),
    }  # fmt: skip


def _megatron(clock: Callable[[], float], words: list[str]) -> dict[str, Any]:
    prefix, samples = Path(words[0]), int(words[1])
    import megatron.core.datasets.gpt_dataset  # noqa: F401  its time is not that of the data

    with tempfile.TemporaryDirectory(dir=prefix.parent) as cache:
        memory, started = reset_peak(), clock()
        train = megatron_dataset(prefix, Path(cache), samples=samples, seq_length=DOCUMENT_TOKENS)
        train[0]
        seconds = clock() - started
        size = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
    return {
        "open_seconds": seconds, "memory_bytes": peak_bytes() - memory, "index_bytes": size
    }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        what, clock, *words = sys.argv[2:]
        measure = {"ours": _ours, "megatron": _megatron}[what]
        print(json.dumps(measure(CLOCKS[clock], words)))
    else:
        main(sys.argv[1:])
