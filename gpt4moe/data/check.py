"""Checks the data of a run before anything expensive starts: files, vocabulary, tokenizer, sizes. No torch.

check_data reads manifest.json and hashes the tokenizer once a launch. Later steps get the result as CheckedData.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from gpt4moe.config.run import RunConfig
from gpt4moe.config.training import DataKind
from gpt4moe.data.indexed import MAKE_DATA, IndexedTokens
from gpt4moe.data.manifest import DataManifest, file_sha256
from gpt4moe.errors import DataError

SPLITS = ("train", "valid")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedData:
    """The result of check_data: facts of a run's data."""

    identity: dict[str, str]
    """Hashes that must be the same on a restart: "data", of the tokens and their shares; "tokenizer". They do not
    depend on where the folder lies."""
    tokenizer: Path | None = None
    """data.tokenizer, or the data folder's own; None for synthetic tokens without one."""
    shares: dict[str, float] | None = None
    """Share of samples of each source; None for synthetic tokens."""


def check_data(run: RunConfig) -> CheckedData:
    """Opens every file that the run will read.

    Raises: DataError for missing or damaged files, another vocabulary or tokenizer, an unknown source or a short one.
    """
    if run.data.kind is DataKind.mock:
        return _check_mock(run)
    folder = data_folder(run)
    manifest = DataManifest.read(folder)
    if manifest.vocab_size != run.model.vocab_size:
        raise DataError(
            f"model.vocab_size={run.model.vocab_size}, but the data of {folder} has a vocabulary of "
            f"{manifest.vocab_size}.",
            f"Set model.vocab_size={manifest.vocab_size}, or make data of the other vocabulary.",
        )
    path = _tokenizer_of(run, manifest)
    _require_file(path)
    tokenizer_hash = file_sha256(path)
    if tokenizer_hash != manifest.tokenizer_sha256:
        raise DataError(
            f"The tokenizer {path} is not the one that made the data of {folder}.",
            "Leave data.tokenizer unset, or make the data again with this tokenizer (tools/tokenize_corpus.py).",
        )
    shares = manifest.shares(run.data.sources)
    for source in shares:
        for split in SPLITS:
            tokens = _checked_tokens(folder, manifest, source, split)
            _require_length(source, split, tokens=tokens, seq_length=run.model.seq_length)
    identity = {"data": _hash_of_tokens(manifest, shares), "tokenizer": tokenizer_hash}
    return CheckedData(identity=identity, tokenizer=path, shares=shares)


def _check_mock(run: RunConfig) -> CheckedData:
    """Synthetic tokens: at most a tokenizer is read."""
    if run.data.tokenizer is None:
        return CheckedData(identity={"data": "mock", "tokenizer": "none"})
    path = Path(run.data.tokenizer)
    if not path.is_file():
        raise DataError(f"data.tokenizer={path} is missing.", "Leave data.tokenizer unset for data=mock.")
    return CheckedData(identity={"data": "mock", "tokenizer": file_sha256(path)}, tokenizer=path)


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


def data_folder(run: RunConfig) -> Path:
    assert run.data.path is not None  # DataConfig.validate
    return Path(run.data.path)


def tokenizer_path(run: RunConfig) -> Path | None:
    """CheckedData.tokenizer, where the tokens themselves are not needed. Raises: DataError for a damaged manifest."""
    if run.data.tokenizer is not None or run.data.kind is DataKind.mock:
        return None if run.data.tokenizer is None else Path(run.data.tokenizer)
    return _tokenizer_of(run, DataManifest.read(data_folder(run)))


def _tokenizer_of(run: RunConfig, manifest: DataManifest) -> Path:
    return Path(run.data.tokenizer) if run.data.tokenizer is not None else data_folder(run) / manifest.tokenizer


def _hash_of_tokens(manifest: DataManifest, shares: dict[str, float]) -> str:
    content = {
        "vocab_size": manifest.vocab_size,
        "eos_id": manifest.eos_id,
        "sources": {
            name: [manifest.sources[name].train.bin_sha256, manifest.sources[name].valid.bin_sha256, share]
            for name, share in shares.items()
        },
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
