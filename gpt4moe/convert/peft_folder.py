"""A checkpoint's adapters as a folder that PEFT loads onto a Hugging Face folder of their base. No torch.

    qkv         one A, B [out, r]        q_proj, k_proj, v_proj, each with that A and its rows of B
    gate, up    one A, B [2, F, r]       gate_proj, up_proj of a dense MLP, in the same way
    experts     A [E, r, in]             lora_A [E * r, in], expert by expert
                B [E, out, r]            lora_B [out, r * E], whose column r * E + e is column r of expert e

PEFT adapts the fused experts of transformers 5 ([E, 2F, H]) by `target_parameters`, and wraps a module once for each
parameter: where both are adapted, gate_up_proj lies inside down_proj's wrapper (peft 0.21.2, tuners/lora/layer.py,
ParamWrapper).
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpt4moe.architecture.names import split_name
from gpt4moe.config.checksums import SUMS
from gpt4moe.convert.adapters import MergedWeights
from gpt4moe.convert.architectures import architecture_of
from gpt4moe.convert.copy_pipeline import progress_bar
from gpt4moe.convert.publish import published, refuse_existing
from gpt4moe.convert.safetensors_file import NewTensor
from gpt4moe.errors import ConversionError

_MODEL = "base_model.model"
_FILE = "adapter_model.safetensors"

Answer = dict[str, Any]
Pair = tuple[np.ndarray, np.ndarray]


def to_peft(checkpoint: Path, out: Path, *, model: str, base: Path | None = None) -> Answer:
    """Writes adapter_config.json and adapter_model.safetensors, fp32, and SHA256SUMS of both.

    Args:
        model: what PEFT calls the base: a folder made by to-hf from the base's checkpoint, or a name.
        base: where the base's checkpoint is, if it was moved.
    Raises: ConversionError when no architecture fits, `model` is no such thing, or `out` exists or cannot be written;
        CheckpointError.
    """
    refuse_existing(out)
    _require_model(model)
    source = MergedWeights(checkpoint, base)
    pairs = dict(_pairs(source))
    modules = [name.removesuffix(".weight") for name in pairs if name.endswith(".weight")]
    parameters = [name for name in pairs if not name.endswith(".weight")]
    tensors = [
        NewTensor.of_array(f"{_MODEL}.{_wrapped(name, parameters)}.lora_{part}.weight", values)
        for name, pair in pairs.items()
        for part, values in zip("AB", pair, strict=True)
    ]
    lora = source.adapted.stage.lora
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model, "inference_mode": True,
        "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "target_modules": modules, "target_parameters": parameters or None,
    }  # fmt: skip
    hashes = [entry.block_hashes for entry in source.adapters.manifest.files]
    total = sum(tensor.size_bytes("F32") for tensor in tensors)
    with published(out, json.dumps(["to-peft", config, hashes]), total) as draft, progress_bar(out.name, total) as done:
        entry = draft.tensors(_FILE, tensors, dtype="F32", metadata={"format": "pt"}, advance=done)
        draft.json("adapter_config.json", config)
        draft.checksums(SUMS)
    return {
        "out": str(out), "tensors": len(tensors), "size_bytes": total,
        "files": [{"name": entry.name, "size_bytes": entry.size}],
    }  # fmt: skip


def _require_model(model: str) -> None:
    """Raises: ConversionError for what is neither a folder with a model nor may be a name, OWNER/MODEL, of the hub."""
    if (Path(model) / "config.json").is_file():
        return
    if Path(model).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        problem = "has no config.json" if Path(model).exists() else "is no folder, and no name like OWNER/MODEL"
        raise ConversionError(
            f"--model {model} {problem}: PEFT would not find the base by it.",
            "Give a folder made from the base: tools/convert_checkpoint.py to-hf BASE FOLDER --dtype fp32.",
        )


def _pairs(source: MergedWeights) -> Iterator[tuple[str, Pair]]:
    """Their name of each adapted parameter, and its A and B as PEFT stores them."""
    architecture = architecture_of(source.model)
    rows = {row.ours: row for row in architecture.fused or architecture.rows}
    for name in source.shapes:
        pair = source.pair(name)
        if pair is None:
            continue
        a, b = pair
        layer, own_name = split_name(name)
        row = rows[own_name]
        for fields, shape, boxes in row.rule(b.shape, source.model):
            where = [tuple(slice(o, o + n) for o, n in zip(*box, strict=True)) for box in boxes]
            rows_of_b = np.concatenate([b[box].reshape(-1) for box in where]).reshape(shape)
            if a.ndim == 3:
                yield row.theirs.format(layer=layer, **fields), (a.reshape(-1, a.shape[-1]), _by_expert(rows_of_b))
            else:
                yield row.theirs.format(layer=layer, **fields), (a, rows_of_b)


def _by_expert(b: np.ndarray) -> np.ndarray:
    """[E, out, r] -> [out, r * E]."""
    return np.ascontiguousarray(b.transpose(1, 2, 0)).reshape(b.shape[1], -1)


def _wrapped(name: str, parameters: list[str]) -> str:
    """The module of PEFT's that holds the adapter of a parameter."""
    module, _, parameter = name.rpartition(".")
    has_outer = parameter == "gate_up_proj" and f"{module}.down_proj" in parameters
    return f"{module}.base_layer" if has_outer else module
