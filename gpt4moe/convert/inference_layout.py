"""A checkpoint cut for inference: one safetensors file a rank of a tp x pp grid, and index.json.

    tp-03-pp-00.safetensors   keys NAME@OFFSET as in a checkpoint: the rectangle of the tensor that the rank holds
    index.json                the grid, the layers of each stage, the model, every file's hashes

Matrices are cut over tp as in training, experts are spread over it whole; what training keeps whole, every rank has.
"""

import dataclasses
import json
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

from gpt4moe.checkpoint.storage import FileEntry
from gpt4moe.config.model import ModelConfig, divisors
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.convert.huggingface import DTYPES
from gpt4moe.convert.inference_reading import FORMAT, INDEX
from gpt4moe.convert.progress import progress_bar
from gpt4moe.convert.publish import published, refuse_existing
from gpt4moe.convert.safetensors_file import BYTES, NewTensor
from gpt4moe.convert.weights import CheckpointWeights, Weights
from gpt4moe.errors import ConversionError
from gpt4moe.model.cuts import Cut, rule_of
from gpt4moe.model.logical import Box, routing_buffers
from gpt4moe.parallel.placement import stage_layers

_AXIS = {Cut.rows: 0, Cut.columns: 1, Cut.gated_rows: 1, Cut.experts_gated: 0, Cut.experts: 0}
"""The dimension of the logical tensor that is cut over tp; Cut.whole has none."""
_EMBEDDING = "embedding.word_embeddings.weight"

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
        draft.json(INDEX, index_of(source, answer, files))
    return answer


def rank_contents(
    weights: Weights, tp: int, pp: int, layers_per_stage: list[int] | None
) -> tuple[list[list[int]], dict[tuple[int, int], list[tuple[str, Box]]]]:
    """(layers of each stage, (tp index, pp index) -> what that rank holds).

    Raises: ConversionError when the grid does not fit the model.
    """
    stages = _stages(weights.model, tp, pp, layers_per_stage)
    return stages, {
        (t, p): rank_boxes(weights, _names_of(weights.model, weights.shapes, stages, p), t, tp)
        for p in range(pp)
        for t in range(tp)
    }


def rank_file(source: Weights, held: list[tuple[str, Box]]) -> tuple[list[NewTensor], dict[str, str]]:
    """(tensors, metadata) of one rank's file."""
    shapes = json.dumps({name: source.shapes[name] for name, _ in held})
    return [_new(source, name, box) for name, box in held], {"shapes": shapes}


def index_row(rank: tuple[int, int], stages: list[list[int]], entry: FileEntry) -> dict[str, Any]:
    """A rank's file in index.json."""
    return {"tp": rank[0], "pp": rank[1], "layers": stages[rank[1]]} | dataclasses.asdict(entry)


def index_of(source: CheckpointWeights, answer: Answer, files: list[dict[str, Any]]) -> dict[str, Any]:
    """What index.json says."""
    manifest = source.index.manifest
    return {
        "format": FORMAT, **{key: answer[key] for key in ("tp", "pp", "layers_per_stage", "dtype")},
        "step": manifest.step, "run_id": manifest.run_id, "config": manifest.config, "files": files,
    }  # fmt: skip


def rank_boxes(weights: Weights, names: list[str], tp_index: int, tp: int) -> list[tuple[str, Box]]:
    """What one rank holds of each tensor of its stage. Raises: ConversionError when tp does not divide one."""
    held, biases = [], routing_buffers(weights.model)
    for name in names:
        shape = weights.shapes[name]
        axis = None if name in biases else _AXIS.get(rule_of(name).cut)
        if axis is None:
            held.append((name, ((0,) * len(shape), shape)))
            continue
        _require_division(weights.model, name, shape[axis], tp)
        part = shape[axis] // tp
        offset = tuple(part * tp_index if dim == axis else 0 for dim in range(len(shape)))
        held.append((name, (offset, (*shape[:axis], part, *shape[axis + 1 :]))))
    return held


def _stages(model: ModelConfig, tp: int, pp: int, layers_per_stage: list[int] | None) -> list[list[int]]:
    """The layers of each pipeline stage. Raises: ConversionError when they do not fit the model."""
    given = layers_per_stage
    if given is not None and (len(given) != pp or sum(given) != model.num_layers or min(given) < 1):
        raise ConversionError(
            f"--layers-per-stage gives {len(given)} stages of {sum(given)} layers together; --pp is {pp} and "
            f"model.num_layers={model.num_layers}.",
            f"Give {pp} numbers of 1 or more that sum to {model.num_layers}, or leave it out.",
        )
    if tp < 1:
        raise ConversionError(f"--tp {tp} is below 1.", "Set --tp to 1 or more.")
    if not 1 <= pp <= model.num_layers:
        raise ConversionError(
            f"--pp {pp} does not fit model.num_layers={model.num_layers}.", f"Set --pp from 1 to {model.num_layers}."
        )
    return stage_layers(model.num_layers, ParallelConfig(pp=pp, layers_per_stage=given))


def _names_of(model: ModelConfig, names: Iterable[str], stages: list[list[int]], index: int) -> list[str]:
    """The tensors of a stage: its layers', the embedding on the first, the output on the last (which takes a tied
    embedding too)."""
    is_first, is_last = index == 0, index == len(stages) - 1
    found = []
    for name in names:
        layer = name.removeprefix("decoder.layers.").partition(".")[0]
        if layer.isdigit():
            belongs = int(layer) in stages[index]
        elif name == _EMBEDDING:
            belongs = is_first or (is_last and model.tied_embeddings)
        else:
            belongs = is_last
        if belongs:
            found.append(name)
    return found


def _require_division(model: ModelConfig, name: str, size: int, tp: int) -> None:
    """Attention is cut between query groups, never within one."""
    what, count = f"dimension of {size} of {name}", size
    if name.endswith("linear_qkv.weight"):
        what, count = f"model.num_query_groups={model.query_groups}", model.query_groups
    elif rule_of(name).cut in (Cut.experts, Cut.experts_gated):
        what = f"model.moe.num_experts={size}"
    if count % tp:
        raise ConversionError(f"--tp {tp} does not divide {what}.", f"Set --tp to one of {divisors(count)}.")


def _new(source: Weights, name: str, box: Box) -> NewTensor:
    return NewTensor(f"{name}@{','.join(map(str, box[0]))}", box[1], lambda take: source.values(name, [box], take))


def file_name(tp_index: int, pp_index: int) -> str:
    return f"tp-{tp_index:02d}-pp-{pp_index:02d}.safetensors"
