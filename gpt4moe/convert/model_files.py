"""The files beside the weights in a Hugging Face folder: tokenizer, generation settings, model card. No torch."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt4moe.chat.words import TOKENIZER_FOLDER
from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.config.checksums import SUMS, Advance, changed_files, file_sha256
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.convert.folder_tensors import own_path, read_own
from gpt4moe.data.check import tokenizer_path
from gpt4moe.data.folder import TOKENIZER_NAME
from gpt4moe.data.tokenizer import load_backend, load_tokenizer
from gpt4moe.errors import ConversionError, DataError

Files = dict[str, bytes]
"""Name -> content."""
SpecialIds = dict[str, int | list[int] | None]
"""bos_token_id, eos_token_id and pad_token_id of config.json and generation_config.json."""

KEPT = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
GENERATION = "generation_config.json"
_AGAIN = "Copy the folder again from where it is whole."


def tokenizer_files(folder: Path, manifest: Manifest, run: RunConfig, given: Path | None) -> tuple[Files, SpecialIds]:
    """The tokenizer's files with generation_config.json, and the ids of special tokens.

    A run on synthetic tokens has no tokenizer.

    Args:
        given: a tokenizer.json to use instead of the one in the run's config.
    Raises: ConversionError when it is missing or not the run's.
    """
    kept = None if given is not None else kept_folder(folder, manifest, run)
    if kept is not None:
        return kept_files(kept)
    try:
        path = given or tokenizer_path(run)
        if path is None:
            return {GENERATION: _json(_generation(None))}, _ids(None)
        tokenizer = load_tokenizer(path)
    except DataError as error:
        raise ConversionError(error.cause, "Give the run's tokenizer.json with --tokenizer.") from error
    wanted = manifest.identity.get("tokenizer")
    if wanted not in (None, "none") and file_sha256(path) != wanted:
        raise ConversionError(f"{path} is not the run's tokenizer.", "Give the run's own with --tokenizer.")
    if tokenizer.vocab_size > run.model.vocab_size:
        raise ConversionError(
            f"{path} has {tokenizer.vocab_size} tokens, model.vocab_size={run.model.vocab_size}.",
            "Give the run's own with --tokenizer.",
        )
    return {
        "tokenizer.json": path.read_bytes(),
        "tokenizer_config.json": _json(_tokenizer_config(run.model, tokenizer.eos_token)),
        "special_tokens_map.json": _json({"eos_token": tokenizer.eos_token, "pad_token": tokenizer.eos_token}),
        GENERATION: _json(_generation(tokenizer.eos_id)),
    }, _ids(tokenizer.eos_id)


def kept_folder(folder: Path, manifest: Manifest, run: RunConfig) -> Path | None:
    """Where a checkpoint's tokenizer lies with all its files, as Hugging Face has them; None: nowhere.

    Its own, which from-hf makes. Else that of the conversations that it learned, with their chat template. Else, of
    adapters, that of their base, if it is the tokenizer that they were trained with.

    Args:
        folder: of the checkpoint; of adapters, of their base.
    """
    kept = folder / TOKENIZER_FOLDER
    if manifest.base is None and kept.is_dir():
        return kept
    found = [] if manifest.base is None else [(kept, kept / TOKENIZER_NAME)]
    with suppress(DataError):  # data that is gone: the caller may have another tokenizer, or tells of it
        path = tokenizer_path(run)
        found[:0] = [] if path is None else [(path.parent / TOKENIZER_FOLDER, path)]
    wanted = manifest.identity.get("tokenizer")
    return next((place for place, path in found if place.is_dir() and _is_tokenizer(path, wanted)), None)


def _is_tokenizer(path: Path, wanted: object) -> bool:
    return wanted in (None, "none") or (path.is_file() and file_sha256(path) == wanted)


def kept_files(folder: Path) -> tuple[Files, SpecialIds]:
    """Every file of a tokenizer folder, and its special ids.

    Raises: ConversionError for a file that was changed, is a link that leads out of the folder, or is none.
    """
    require_unchanged(own_path(folder))
    try:
        paths = [own_path(path) for path in sorted(folder.iterdir()) if path.name != SUMS]
        files = {path.name: path.read_bytes() for path in paths}
        settings = json.loads(files.get(GENERATION, b"{}"))
        if not isinstance(settings, dict):
            raise ValueError(f"{GENERATION} is no JSON object")
        if TOKENIZER_NAME in files:
            load_backend(folder / TOKENIZER_NAME)
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{folder} cannot be read ({error}).", _AGAIN) from error
    except DataError as error:
        raise ConversionError(error.cause, _AGAIN) from error
    return files, {name: settings.get(name) for name in SPECIAL_IDS}


def require_unchanged(folder: Path, advance: Advance | None = None) -> None:
    """Raises: ConversionError for a file that is not what the folder's SHA256SUMS says, where it has one."""
    changed = changed_files(folder, advance=advance)
    if changed:
        raise ConversionError(changed[0], f"{_AGAIN} If it is as it should be, remove {folder / SUMS}.")


def _tokenizer_config(model: ModelConfig, eos_token: str) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.seq_length,
        "eos_token": eos_token,
        "pad_token": eos_token,  # no pad token: batches are padded with the end of text, and masked
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }


def _generation(eos_id: int | None) -> dict[str, Any]:
    return {"_from_model_config": True, **_ids(eos_id)}


def _ids(eos_id: int | None) -> SpecialIds:
    return {"bos_token_id": None, "eos_token_id": eos_id, "pad_token_id": eos_id}


def generation_of(source: Path, config: dict[str, Any]) -> tuple[bytes, list[str]]:
    """(generation_config.json of a Hugging Face folder, notes); special ids that it lacks come from config.json.

    A pad_token_id outside the vocabulary is left out: fine-tuned models add one without a row for it, and nothing
    reads it. Raises: ConversionError for another special id that is no token.
    """
    path = source / GENERATION
    try:
        given = json.loads(read_own(path)) if os.path.lexists(path) else {"_from_model_config": True}
        found = {name: config.get(name) for name in SPECIAL_IDS} | given
        most = config["vocab_size"] if isinstance(config.get("vocab_size"), int) else 2**31
        pad, notes = found.get("pad_token_id"), list[str]()
        if isinstance(pad, int) and not -1 <= pad < most:
            found["pad_token_id"] = None
            notes.append(f"pad_token_id={pad} was left out: the vocabulary has {most} tokens, counted from 0.")
        _require_ids(path, found, most)
        return _json(found), notes
    except (ValueError, TypeError, RecursionError) as error:
        raise ConversionError(f"{path} is no JSON object.", "Copy or download the folder again.") from error


def _require_ids(path: Path, found: dict[str, Any], most: int) -> None:
    """Raises: ConversionError for special ids that are no tokens of the vocabulary; -1 is none, in old folders."""
    for name in SPECIAL_IDS:
        value = found.get(name)
        for one in value if isinstance(value, list) else [value]:
            is_id = isinstance(one, int) and not isinstance(one, bool) and -1 <= one < most
            if one is not None and not is_id:
                raise ConversionError(
                    f"{name}={one!r} of {path.parent} is no token of its vocabulary of {most}.",
                    f"Correct it in {GENERATION} or config.json.",
                )


def model_card(manifest: Manifest, run: RunConfig, *, dtype: str, licence: str, notes: list[str]) -> str:
    """README.md: licence, source run, shape, data."""
    model, moe = run.model, run.model.moe
    experts = f"{moe.num_experts} experts of {moe.ffn_hidden_size}, top {moe.top_k}" if moe else "dense"
    sources = ", ".join(f"{name} ({count} samples)" for name, count in manifest.consumed_per_source.items())
    lengths = [str(length) for first, length in run.step_sizes.lengths() if first <= manifest.consumed_samples]
    facts = {
        "Model": model.name,
        "Run": f"{run.run.name} ({manifest.run_id})",
        "Step": manifest.step,
        "Samples": f"{manifest.consumed_samples} of {', then '.join(lengths)} tokens",
        "Data": sources or "not recorded",
        "Layers": f"{model.num_layers}, hidden {model.hidden_size}, {experts}",
        "Attention": f"{model.num_attention_heads} heads, {model.query_groups} groups of keys and values",
        "Vocabulary": model.vocab_size,
        "Weights": f"{dtype}, from the fp32 master weights",
        "Config": hashlib.sha256(json.dumps(manifest.config, sort_keys=True).encode()).hexdigest()[:16],
    }
    table = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    remarks = "".join(f"\n{note}\n" for note in notes)
    return (
        f"---\nlicense: {licence}\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# {model.name}\n\nTrained and exported with gpt4moe.\n\n| | |\n|---|---|\n{table}{remarks}"
    )


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
