"""A checkpoint cut for inference: one safetensors file a rank of a tp x pp grid, and index.json.

    tp-03-pp-00.safetensors   keys NAME@OFFSET as in a checkpoint: the rectangle of the tensor that the rank holds
    index.json                the grid, the layers of each stage, the model, every file's hashes; sealed by its sha256

inference_grid.py says which rank holds what.
"""

import dataclasses
import json
from math import prod
from pathlib import Path
from typing import Any

from gpt4moe.architecture.tensors import Box
from gpt4moe.checkpoint.manifest import sealed
from gpt4moe.checkpoint.storage import FileEntry
from gpt4moe.convert.huggingface import DTYPES
from gpt4moe.convert.inference_grid import file_name, key_of, rank_contents
from gpt4moe.convert.inference_reading import FORMAT, INDEX
from gpt4moe.convert.progress import progress_bar
from gpt4moe.convert.publish import published, refuse_existing
from gpt4moe.convert.safetensors_file import BYTES, NewTensor
from gpt4moe.convert.weights import CheckpointWeights, Weights

Answer = dict[str, Any]


def to_inference_layout(
    checkpoint: Path, out: Path, *, tp: int, pp: int, layers_per_stage: list[int] | None = None, dtype: str = "bf16",
    dry_run: bool = False,
) -> Answer:  # fmt: skip
    """Writes the rank files.

    Args:
        layers_per_stage: pp numbers; None: as even as it goes, larger stages first.
    Raises: ConversionError when the grid does not fit the model, or `out` exists or cannot be written; CheckpointError.
    """
    if not dry_run:
        refuse_existing(out)
    source = CheckpointWeights(checkpoint)
    stages, ranks = rank_contents(source, tp, pp, layers_per_stage)
    code = DTYPES[dtype][0]
    sizes = {rank: sum(prod(box[1]) for _, box in held) * BYTES[code] for rank, held in ranks.items()}
    total = sum(sizes.values())
    answer: Answer = {
        "out": str(out), "tp": tp, "pp": pp, "layers_per_stage": [len(layers) for layers in stages],
        "dtype": DTYPES[dtype][1], "size_bytes": total,
        "files": [{"name": file_name(*rank), "size_bytes": size} for rank, size in sizes.items()],
    }  # fmt: skip
    if dry_run:
        return answer
    plan = json.dumps(["to-inference", answer, [entry.block_hashes for entry in source.index.manifest.files]])
    with published(out, plan, total) as draft, progress_bar(f"to {out.name}", total) as advance:
        files = []
        for rank, held in ranks.items():
            tensors, metadata = rank_file(source, held)
            entry = draft.tensors(file_name(*rank), tensors, dtype=code, metadata=metadata, advance=advance)
            files.append(index_row(rank, stages, entry))
        draft.text(INDEX, index_text(source, answer, files))
    return answer


def rank_file(source: Weights, held: list[tuple[str, Box]]) -> tuple[list[NewTensor], dict[str, str]]:
    """(tensors, metadata) of one rank's file."""
    shapes = json.dumps({name: source.shapes[name] for name, _ in held})
    return [_new(source, name, box) for name, box in held], {"shapes": shapes}


def index_row(rank: tuple[int, int], stages: list[list[int]], entry: FileEntry) -> dict[str, Any]:
    """A rank's file in index.json."""
    return {"tp": rank[0], "pp": rank[1], "layers": stages[rank[1]]} | dataclasses.asdict(entry)


def index_text(source: CheckpointWeights, answer: Answer, files: list[dict[str, Any]]) -> str:
    """What index.json says."""
    manifest = source.index.manifest
    content = {
        "format": FORMAT, **{key: answer[key] for key in ("tp", "pp", "layers_per_stage", "dtype")},
        "step": manifest.step, "run_id": manifest.run_id, "config": manifest.config, "files": files,
    }  # fmt: skip
    return sealed(json.dumps(content, indent=1))


def _new(source: Weights, name: str, box: Box) -> NewTensor:
    return NewTensor(key_of(name, box), box[1], lambda take: source.values(name, [box], take))
