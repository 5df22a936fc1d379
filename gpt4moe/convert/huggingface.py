"""Hugging Face folders: writing one from a checkpoint (to_huggingface), reading one (open_huggingface). No torch.

fp32 master weights --links--> our boxes for each Hugging Face tensor --> cast --> shards of at most N bytes
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from gpt4moe.architecture.names import WORD_EMBEDDINGS, split_name
from gpt4moe.convert.adapters import open_checkpoint
from gpt4moe.convert.architectures import architecture_named, architecture_of, export_notes, known_names
from gpt4moe.convert.export import DTYPES, Export
from gpt4moe.convert.folder_tensors import new_tensor, own_path, place, stored_tensors
from gpt4moe.convert.hf_config import from_config, to_config
from gpt4moe.convert.model_files import tokenizer_files
from gpt4moe.convert.publish import refuse_existing
from gpt4moe.convert.rules import NameRow, links, require_whole
from gpt4moe.convert.safetensors_file import StoredTensor
from gpt4moe.convert.vision_files import vision_files
from gpt4moe.convert.weights import FolderWeights, TypedPiece
from gpt4moe.errors import ConversionError

_OUTPUT = "lm_head.weight"

Answer = dict[str, Any]


def to_huggingface(
    checkpoint: Path, out: Path, *, dtype: str = "bf16", max_shard_bytes: int = 5 * 10**9,
    tokenizer: Path | None = None, licence: str = "apache-2.0", base: Path | None = None, encoder: Path | None = None,
    image_token: str | None = None, dry_run: bool = False,
) -> Answer:  # fmt: skip
    """Exports a checkpoint as the architecture that architecture_of chooses; the vision parts of a vision model into a
    folder vision/ beside it. `dry_run`: writes nothing, only answers.

    Args:
        base: where the base of adapters is, if it was moved.
        encoder: where the folder of a vision model's image encoder is, if it was moved.
        image_token: what stands for an image, if it is not `<image>`.
    Raises: ConversionError when no architecture fits, a file that is needed is gone, or `out` exists or cannot be
        written; CheckpointError.
    """
    if not dry_run:
        refuse_existing(out)
    source = open_checkpoint(checkpoint, base)
    code, torch_name = DTYPES[dtype]
    all_links = list(links(architecture_of(source.model).rows, source.shapes, source.model))
    require_whole(all_links, source.shapes)
    files, special = tokenizer_files(source.folder, source.manifest, source.run, tokenizer)
    vision = vision_files(source, files.get("tokenizer.json"), encoder, image_token, (code, max_shard_bytes))
    export = Export(
        source=source, config=to_config(source.model, dtype=torch_name, special=special),
        tensors=[new_tensor(link, source) for link in all_links], dtype=dtype, max_shard_bytes=max_shard_bytes,
        files=files, licence=licence, notes=export_notes(source.model) + (vision.notes() if vision else []),
        vision=vision,
    )  # fmt: skip
    if not dry_run:
        export.write(out)
    return export.answer(out)


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
        config = json.loads(own_path(path).read_text(encoding="utf-8"))
        assert isinstance(config, dict)
        return config
    except (OSError, ValueError, RecursionError, AssertionError) as error:
        what = "is missing" if not path.exists() else "is no JSON object"
        raise ConversionError(f"{path} {what}.", "Give a folder in Hugging Face format.") from error


def add_pieces(
    weights: FolderWeights, table: tuple[NameRow, ...], tensors: dict[str, StoredTensor], places: dict[str, str]
) -> None:
    """Fills weights.pieces: finds each of our boxes in the Hugging Face tensors.

    Raises: ConversionError for a tensor that is missing, unknown or of another shape, and for an output layer that
        differs from the embedding that config.json ties it to.
    """
    known = {row.ours for row in table}
    covered = {name: shape for name, shape in weights.shapes.items() if split_name(name)[1] in known}
    left = place(weights, links(table, covered, weights.model), tensors, places)
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
