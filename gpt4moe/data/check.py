"""The data of a run, before anything heavy starts and without torch: is it there, does it fit, what is its identity."""

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
    """Opens what the run will read.

    Raises: DataError for missing or damaged files, another vocabulary or tokenizer, an unknown or too short source.
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
    _check_tokenizer(run, folder, manifest)
    for source in manifest.shares(run.data.sources):
        for split in SPLITS:
            _check_split(folder, manifest, source, split, seq_length=run.model.seq_length)


def data_identity(run: RunConfig) -> dict[str, str]:
    """What a restart of the run must find again: hashes of its tokens with their shares, and of its tokenizer.

    Independent of where the folder lies. Call check_data first.
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


def _check_tokenizer(run: RunConfig, folder: Path, manifest: DataManifest) -> None:
    path = tokenizer_path(run)
    assert path is not None
    if not path.is_file():
        raise DataError(f"The tokenizer {path} is missing.", MAKE_DATA)
    if file_sha256(path) != manifest.tokenizer_sha256:
        raise DataError(
            f"The tokenizer {path} is not the one that made the data of {folder}.",
            "Leave data.tokenizer unset, or make the data again with this tokenizer (tools/tokenize_corpus.py).",
        )


def _check_split(folder: Path, manifest: DataManifest, source: str, split: str, *, seq_length: int) -> None:
    tokens = IndexedTokens(folder / f"{source}-{split}").num_tokens
    promised = getattr(manifest.sources[source], split).tokens
    if tokens != promised:
        raise DataError(
            f"{folder / source}-{split}.bin has {tokens} tokens, the manifest says {promised}.",
            f"Delete the folder. {MAKE_DATA}",
        )
    if tokens < seq_length + 1:
        raise DataError(
            f"Source {source} has {tokens} {split} tokens; one sample of model.seq_length={seq_length} takes "
            f"{seq_length + 1}.",
            f"Set data.sources.{source}=0, model.seq_length to {max(1, tokens - 1)} or less, or give more text.",
        )
