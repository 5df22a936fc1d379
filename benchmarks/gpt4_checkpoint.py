"""Time and memory of the tools on GPT-4's checkpoint without data: a manifest, 3120 files of headers and holes.

    python -m benchmarks.gpt4_checkpoint

1.833T parameters, fp32 weights and Adam's moments, 22 TB, as tp 8 x pp 15 x dp 26 would leave them: each of a stage's
208 ranks owns an equal flat range of every tensor of the stage, as rectangles. The files are sparse: their sizes are
right, and nothing but headers is on the disk. Every target is computed and checked to cover the model, none is written.
"""

import json
import sys
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import xxhash

from benchmarks.harness.command import read_options
from benchmarks.harness.process import machine, measured
from gpt4moe.architecture.names import split_name
from gpt4moe.architecture.rows import Shape
from gpt4moe.architecture.tensors import logical_shapes
from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.storage import FileEntry, block_bytes_for
from gpt4moe.checkpoint.writing import encoded_header
from gpt4moe.config.load import config_to_dict, load_run_config
from gpt4moe.config.optimizer import OptimizerKind
from gpt4moe.config.optimizer_table import OPTIMIZERS
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.placement import stage_layers
from gpt4moe.parallel.shard import WEIGHT, Rectangle, flat_rectangles

STAGE_RANKS = 208
KINDS = (WEIGHT, *OPTIMIZERS[OptimizerKind.adamw].states)
LARGEST_SLICE_BYTES = 4 * 28672 * 10752  # one expert's gate, fp32
ALLOWED_BYTES = 300e6 + 2 * LARGEST_SLICE_BYTES
COMMANDS = {
    "show": ["tools/inspect_checkpoint.py", "show", "{}", "--json"],
    "to-hf --dry-run": ["tools/convert_checkpoint.py", "to-hf", "{}", "{}/out", "--dry-run", "--json"],
    "to-inference --tp 8 --pp 16 --dry-run": [
        "tools/convert_checkpoint.py", "to-inference", "{}", "{}/out", "--tp", "8", "--pp", "16", "--dry-run", "--json",
    ],
}  # fmt: skip


def main(arguments: list[str]) -> None:
    read_options(__doc__, arguments)
    run = load_run_config(["+experiment=gpt4", "run.name=gpt4", "data=mock"])
    print(f"GPT-4's checkpoint of headers. {machine()}")
    baseline = measured("-c", "import numpy").peak_bytes
    with tempfile.TemporaryDirectory() as folder:
        slices = write_headers(Path(folder), run)
        manifest_bytes = (Path(folder) / "manifest.json").stat().st_size
        print(f"{slices} slices; manifest.json {manifest_bytes / 1e6:.1f} MB")
        for name, command in COMMANDS.items():
            done = measured(*(part.format(folder) for part in command))
            memory = done.peak_bytes - baseline
            judged = "" if name == "show" else f" (allowed {ALLOWED_BYTES / 1e6:.0f})"
            print(f"{name:<40} {done.seconds:6.1f} s  {memory / 1e6:6.0f} MB{judged}  {_said(json.loads(done.out))}")


def _said(answer: dict[str, Any]) -> str:
    if "size_bytes" not in answer:
        return f"{len(answer['files'])} files, step {answer['step']}"
    return f"{len(answer['files'])} targets of {answer['size_bytes'] / 1e12:.3f} TB together"


def write_headers(folder: Path, run: RunConfig) -> int:
    """A step folder as a run would leave it, with holes for data. Returns the number of slices."""
    shapes = logical_shapes(run.model)
    cuts: dict[Shape, list[list[Rectangle]]] = {}
    for shape in shapes.values():
        edges = [prod(shape) * rank // STAGE_RANKS for rank in range(STAGE_RANKS + 1)]
        if shape not in cuts:
            cuts[shape] = [flat_rectangles(*edges[rank : rank + 2], shape) for rank in range(STAGE_RANKS)]
    entries, slices = [], 0
    stages = stage_layers(run.model.num_layers, run.parallel)
    for stage, layers in enumerate(stages):
        held = {name: shape for name, shape in shapes.items() if _stage_of(name, stages) == stage}
        assert len(layers) == 8
        for index in range(STAGE_RANKS):
            rank = stage * STAGE_RANKS + index
            entry, count = _write_header(folder / f"rank-{rank:05d}.safetensors", held, cuts, index)
            entries.append(entry)
            slices += count
    Manifest(
        step=1, consumed_samples=0, consumed_per_source={}, optimizer_step=1, run_id="headers", identity={},
        config=config_to_dict(run), layout="tp 8 x pp 15 x dp 26", versions={}, files=entries,
    ).save(folder)  # fmt: skip
    return slices


def _stage_of(name: str, stages: list[list[int]]) -> int:
    layer, _ = split_name(name)
    if layer is not None:
        return next(stage for stage, layers in enumerate(stages) if layer in layers)
    return 0 if name.startswith("embedding") else len(stages) - 1


def _write_header(
    file: Path, held: dict[str, Shape], cuts: dict[Shape, list[list[Rectangle]]], index: int
) -> tuple[FileEntry, int]:
    layout: dict[str, Any] = {
        "__metadata__": {
            "shapes": json.dumps({f"{kind}/{name}": shape for kind in KINDS for name, shape in held.items()})
        }
    }
    end = 0
    for kind in KINDS:
        for name, shape in held.items():
            for part in cuts[shape][index]:
                start, end = end, end + 4 * prod(part.shape)
                key = f"{kind}/{name}@{','.join(map(str, part.offset))}"
                layout[key] = {"dtype": "F32", "shape": part.shape, "data_offsets": [start, end]}
    header = encoded_header(layout)
    with file.open("wb") as opened:
        opened.write(header)
        opened.truncate(len(header) + end)
    block = block_bytes_for(end)
    hashes = ["0" * 16] * -(-end // block)  # of data that is not there
    entry = FileEntry(
        name=file.name, size=len(header) + end, header_bytes=len(header), header_hash=_hash(header), block_bytes=block,
        block_hashes=hashes,
    )  # fmt: skip
    return entry, len(layout) - 1


def _hash(header: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(header)


if __name__ == "__main__":
    main(sys.argv[1:])
