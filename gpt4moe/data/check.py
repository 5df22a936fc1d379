"""Checks the data of a run before anything expensive starts: is it there, does it fit, what identifies it. No torch."""

import hashlib
import json
from pathlib import Path

from gpt4moe.config.data import DataKind
from gpt4moe.config.run import RunConfig
from gpt4moe.data.indexed import MAKE_DATA, IndexedTokens
from gpt4moe.data.manifest import DataManifest, file_sha256
from gpt4moe.errors import DataError

SPLITS = ("train", "valid")


def check_data(run: RunConfig) -> None:
    """Opens every file that the run will read.

    Raises: DataError for missing or damaged files, another vocabulary or tokenizer, an unknown source or a short one.
    """
    if run.data.kind is DataKind.mock:
        if run.data.tokenizer is not None and not Path(run.data.tokenizer).is_file():
            raise DataError(
                f"data.tokenizer={run.data.tokenizer} is missing.", "Leave data.tokenizer unset for data=mock."
            )
        return
    folder = data_folder(run)
    manifest = DataManifest.read(folder)
    if manifest.vocab_size != run.model.vocab_size:
        raise DataError(
            f"model.vocab_size={run.model.vocab_size}, but the data of {folder} has a vocabulary of "
            f"{manifest.vocab_size}.",
            f"Set model.vocab_size={manifest.vocab_size}, or make data of the other vocabulary.",
        )
    path = tokenizer_path(run)
    assert path is not None
    _require_file(path)
    if file_sha256(path) != manifest.tokenizer_sha256:
        raise DataError(
            f"The tokenizer {path} is not the one that made the data of {folder}.",
            "Leave data.tokenizer unset, or make the data again with this tokenizer (tools/tokenize_corpus.py).",
        )
    for source in manifest.shares(run.data.sources):
        for split in SPLITS:
            tokens = _checked_tokens(folder, manifest, source, split)
            _require_length(source, split, tokens=tokens, seq_length=run.model.seq_length)


def read_whole_folder(folder: Path) -> DataManifest:
    """The manifest of a folder, after checking that every file is there and is the one that the manifest describes.

    Raises: DataError otherwise.
    """
    manifest = DataManifest.read(folder)
    _require_file(folder / manifest.tokenizer)
    if file_sha256(folder / manifest.tokenizer) != manifest.tokenizer_sha256:
        raise DataError(
            f"{folder / manifest.tokenizer} is not the tokenizer of the manifest.", f"Delete the folder. {MAKE_DATA}"
        )
    for source in manifest.sources:
        for split in SPLITS:
            _checked_tokens(folder, manifest, source, split)
    return manifest


def data_identity(run: RunConfig) -> dict[str, str]:
    """What must be the same on a restart of the run: hashes of its tokens with their shares, and of its tokenizer.

    Does not depend on the folder's path. Call check_data first.
    """
    tokenizer = tokenizer_path(run)
    tokenizer_hash = file_sha256(tokenizer) if tokenizer is not None else "none"
    if run.data.kind is DataKind.mock:
        return {"data": "mock", "tokenizer": tokenizer_hash}
    manifest = DataManifest.read(data_folder(run))
    shares = manifest.shares(run.data.sources)
    content = {
        "vocab_size": manifest.vocab_size,
        "eos_id": manifest.eos_id,
        "sources": {
            name: [manifest.sources[name].train.bin_sha256, manifest.sources[name].valid.bin_sha256, share]
            for name, share in shares.items()
        },
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {"data": digest, "tokenizer": tokenizer_hash}


def data_folder(run: RunConfig) -> Path:
    assert run.data.path is not None  # DataConfig.validate
    return Path(run.data.path)


def tokenizer_path(run: RunConfig) -> Path | None:
    """data.tokenizer, or the data folder's own; None for synthetic tokens without one."""
    if run.data.tokenizer is not None:
        return Path(run.data.tokenizer)
    if run.data.kind is DataKind.mock:
        return None
    folder = data_folder(run)
    return folder / DataManifest.read(folder).tokenizer


def _require_file(tokenizer: Path) -> None:
    if not tokenizer.is_file():
        raise DataError(f"The tokenizer {tokenizer} is missing.", MAKE_DATA)


def _checked_tokens(folder: Path, manifest: DataManifest, source: str, split: str) -> int:
    tokens = IndexedTokens(folder / f"{source}-{split}").num_tokens
    promised = getattr(manifest.sources[source], split).tokens
    if tokens != promised:
        raise DataError(
            f"{folder / source}-{split}.bin has {tokens} tokens, the manifest says {promised}.",
            f"Delete the folder. {MAKE_DATA}",
        )
    return tokens


def _require_length(source: str, split: str, *, tokens: int, seq_length: int) -> None:
    if tokens < seq_length + 1:
        raise DataError(
            f"Source {source} has {tokens} {split} tokens; one sample of model.seq_length={seq_length} takes "
            f"{seq_length + 1}.",
            f"Set model.seq_length to {max(1, tokens - 1)} or less, name the other sources only "
            "(++data.sources.NAME=SHARE), or give more text.",
        )
