"""Hugging Face folders: writing one from a checkpoint (to_huggingface), reading one (open_huggingface). No torch.

fp32 master weights --links--> our boxes for each Hugging Face tensor --> cast --> shards of at most N bytes
"""

import hashlib
import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from gpt4moe.architecture.names import WORD_EMBEDDINGS, split_name
from gpt4moe.convert.adapters import open_checkpoint
from gpt4moe.convert.architectures import architecture_named, architecture_of, export_notes, known_names
from gpt4moe.convert.copy_pipeline import progress_bar
from gpt4moe.convert.hf_config import from_config, to_config
from gpt4moe.convert.model_files import model_card, tokenizer_files
from gpt4moe.convert.publish import published, refuse_existing
from gpt4moe.convert.rules import Link, NameRow, is_copy, links, require_whole
from gpt4moe.convert.safetensors_file import BYTES, NewTensor, RawFile, StoredTensor, packed
from gpt4moe.convert.weights import CheckpointWeights, FolderWeights, TypedPiece
from gpt4moe.errors import ConversionError

DTYPES = {"bf16": ("BF16", "bfloat16"), "fp32": ("F32", "float32")}
"""Option -> (name in safetensors, name in torch)."""
_INDEX = "model.safetensors.index.json"
_OUTPUT = "lm_head.weight"

Answer = dict[str, Any]


def to_huggingface(
    checkpoint: Path, out: Path, *, dtype: str = "bf16", max_shard_bytes: int = 5 * 10**9,
    tokenizer: Path | None = None, licence: str = "apache-2.0", base: Path | None = None, dry_run: bool = False,
) -> Answer:  # fmt: skip
    """Exports a checkpoint as the architecture that architecture_of chooses. `dry_run`: writes nothing, only answers.

    Args:
        base: where the base of adapters is, if it was moved.
    Raises: ConversionError when no architecture fits, or `out` exists or cannot be written; CheckpointError.
    """
    if not dry_run:
        refuse_existing(out)
    source = open_checkpoint(checkpoint, base)
    code, torch_name = DTYPES[dtype]
    all_links = list(links(architecture_of(source.model).rows, source.shapes, source.model))
    require_whole(all_links, source.shapes)
    manifest = source.manifest
    files, special = tokenizer_files(source.folder, manifest, source.run, tokenizer)
    config = to_config(source.model, dtype=torch_name, special=special)
    notes = export_notes(source.model)
    card = model_card(manifest, source.run, dtype=torch_name, licence=licence, notes=notes)
    files["README.md"] = card.encode()
    shards = _shards(all_links, BYTES[code], max_shard_bytes)
    sizes = {name: sum(prod(link.shape) for link in part) * BYTES[code] for name, part in shards.items()}
    total = sum(sizes.values())
    answer = {
        "out": str(out), "architecture": config["architectures"][0], "dtype": torch_name,
        "tensors": len(all_links), "parameters": total // BYTES[code], "size_bytes": total,
        "files": [{"name": name, "size_bytes": size} for name, size in sizes.items()], "notes": notes,
    }  # fmt: skip
    if dry_run:
        return answer
    sha = source.block_hashes
    texts = [hashlib.sha256(content).hexdigest() for content in files.values()]
    plan = json.dumps(["to-hf", config, texts, {name: len(part) for name, part in shards.items()}, sha])
    with published(out, plan, total) as draft, progress_bar(f"to {out.name}", total) as advance:
        for name, part in shards.items():
            tensors = [_new(link, source) for link in part]
            draft.tensors(name, tensors, dtype=code, metadata={"format": "pt"}, advance=advance)
        if len(shards) > 1:
            weight_map = {link.theirs: name for name, part in shards.items() for link in part}
            draft.json(_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        draft.json("config.json", config)
        for name, content in files.items():
            draft.content(name, content)
    return answer


def _new(link: Link, source: CheckpointWeights) -> NewTensor:
    return NewTensor(link.theirs, link.shape, lambda take: source.values(link.ours, link.boxes, take))


def _shards(all_links: list[Link], item_bytes: int, limit: int) -> dict[str, list[Link]]:
    """File name -> its tensors, in order."""
    parts = packed([prod(link.shape) * item_bytes for link in all_links], limit)
    if len(parts) == 1:
        return {"model.safetensors": all_links}
    return {
        f"model-{number:05d}-of-{len(parts):05d}.safetensors": all_links[part] for number, part in enumerate(parts, 1)
    }


def open_huggingface(folder: Path) -> FolderWeights:
    """The weights of a folder of a known architecture, with per-expert or fused names.

    Raises: ConversionError when it is damaged, of another architecture, or its tensors do not fit its config.json.
    """
    config = read_config(folder)
    architecture = architecture_named(config)
    model = from_config(config, folder.resolve().name)
    model.validate()
    tensors = stored_tensors(folder)
    is_fused = any(name.endswith("mlp.experts.gate_up_proj") for name in tensors[0])
    table = (architecture.fused if is_fused else None) or architecture.rows
    dtypes = Counter(tensor.dtype for tensor in tensors[0].values())
    weights = FolderWeights(folder, model, dtypes.most_common(1)[0][0] if dtypes else "F32")
    weights.files.update(tensors[2])
    add_pieces(weights, table, tensors[0], tensors[1])
    return weights


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises: ConversionError when it is missing or no JSON."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(config, dict)
        return config
    except (OSError, ValueError, AssertionError) as error:
        what = "is missing" if not path.exists() else "is no JSON object"
        raise ConversionError(f"{path} {what}.", "Give a folder in Hugging Face format.") from error


def stored_tensors(folder: Path) -> tuple[dict[str, StoredTensor], dict[str, str], dict[str, RawFile]]:
    """(tensors of all safetensors files, the file of each, the files); headers are checked."""
    index = folder / _INDEX
    if index.exists():
        try:
            names = sorted({Path(name).name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConversionError(f"{index} is damaged.", "Copy or download it again.") from error
    else:
        names = sorted({path.name for path in folder.glob("*.safetensors")} - set(mistral_files(folder)))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise ConversionError(
            f"{folder} lacks {missing[0] if missing else 'safetensors files with the names of Hugging Face'}.",
            "Copy or download the folder again, in safetensors (other formats can run code).",
        )
    files = {name: RawFile(folder / name) for name in names}
    tensors: dict[str, StoredTensor] = {}
    places: dict[str, str] = {}
    for name, file in files.items():
        for key, tensor in file.tensors.items():
            if key in tensors:
                raise ConversionError(f"{folder} has {key} in two files.", "Copy or download the folder again.")
            tensors[key], places[key] = tensor, name
    return tensors, places, files


def mistral_files(folder: Path) -> list[str]:
    """Files in Mistral's own format. Its repositories have them beside the same weights in Hugging Face format."""
    return sorted(path.name for path in folder.glob("consolidated*.safetensors"))


def add_pieces(
    weights: FolderWeights, table: tuple[NameRow, ...], tensors: dict[str, StoredTensor], places: dict[str, str]
) -> None:
    """Fills weights.pieces: finds each of our boxes in the Hugging Face tensors.

    Raises: ConversionError for a tensor that is missing, unknown or of another shape, and for an output layer that
        differs from the embedding that config.json ties it to.
    """
    known = {row.ours for row in table}
    covered = {name: shape for name, shape in weights.shapes.items() if split_name(name)[1] in known}
    left = dict(tensors)
    for link in links(table, covered, weights.model):
        tensor = left.pop(link.theirs, None)
        if tensor is None:
            raise ConversionError(
                f"{weights.folder} has no tensor {link.theirs}.",
                "The folder is incomplete, or config.json is of another model.",
            )
        if tensor.shape != link.shape:
            raise ConversionError(
                f"{weights.folder}: {link.theirs} is {list(tensor.shape)}, config.json says {list(link.shape)}.",
                "The files and config.json do not belong together.",
            )
        start = tensor.start
        for offset, shape in link.boxes:
            piece = TypedPiece(places[link.theirs], offset, shape, start, tensor.dtype)
            weights.pieces[link.ours].append(piece)
            start += 0 if is_copy(link) else prod(shape) * BYTES[tensor.dtype]
    if weights.model.tied_embeddings and _OUTPUT in left:
        _refuse_another_output(weights, left.pop(_OUTPUT), places[_OUTPUT])
    unknown = [name for name in left if not _ignorable(name)]
    if unknown:
        raise ConversionError(
            f"{weights.folder} has {len(unknown)} tensors of unknown meaning, e.g. {unknown[0]}.",
            f"Only plain {known_names()} models convert, without adapters or quantisation.",
        )


def _refuse_another_output(weights: FolderWeights, output: StoredTensor, file: str) -> None:
    """Folders with a tied embedding may repeat it as lm_head.weight. Raises: ConversionError when the two differ."""
    if output.shape == weights.shapes[WORD_EMBEDDINGS]:
        copy = TypedPiece(file, (0, 0), output.shape, output.start, output.dtype)
        if not weights.differs(WORD_EMBEDDINGS, copy):
            return
    raise ConversionError(
        f"{weights.folder}: config.json says tie_word_embeddings=true, but {_OUTPUT} in {file} is not the tensor "
        "model.embed_tokens.weight.",
        f"Set tie_word_embeddings=false in config.json to keep {_OUTPUT} (transformers uses it), or delete it from "
        f"{file}.",
    )


def _ignorable(name: str) -> bool:
    """Old Llama files contain the angles of the rotary embedding. They are ignored, as they follow from rope_theta."""
    return name.endswith("rotary_emb.inv_freq")
