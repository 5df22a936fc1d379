"""Files of Megatron-LM, pairs of .bin/.idx, as a source of a data folder. They stay where they are."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt4moe.data.folder import finish_folder, new_source, require_source_name, vocabulary_of
from gpt4moe.data.indexed import IndexedTokens
from gpt4moe.data.manifest import Shard, SourceManifest
from gpt4moe.data.shards import describe
from gpt4moe.data.tokenizer import load_tokenizer
from gpt4moe.errors import DataError


def register(
    folder: Path, name: str, *, train: Sequence[Path], valid: Sequence[Path], tokenizer_path: Path, licence: str,
    progress: Callable[[Path], None],
) -> SourceManifest:  # fmt: skip
    """Reads every file, for its hashes, its largest token and its documents, and writes the source's manifest.

    Args:
        train, valid: paths without .bin and .idx.
        progress: called before each file.
    Raises: DataError for a damaged file, one with tokens beyond the vocabulary, and one named twice.
    """
    require_source_name(name)
    _require_once(name, train, valid)
    tokenizer = load_tokenizer(tokenizer_path)
    vocabulary = vocabulary_of(folder, tokenizer, tokenizer_path, replaced=[name])
    with new_source(folder / name) as new:
        shards = {
            split: [_shard(path, folder / name, new, f"{split}-{number:05}", vocabulary.vocab_size, progress)
                    for number, path in enumerate(paths)]
            for split, paths in (("train", train), ("valid", valid))
        }  # fmt: skip
        manifest = SourceManifest(
            tokenizer_sha256=vocabulary.tokenizer_sha256, licence=licence,
            description="registered: " + ", ".join(path.name for path in (*train, *valid)), train=shards["train"],
            valid=shards["valid"],
        )  # fmt: skip
        manifest.write(new)
    finish_folder(folder, vocabulary, tokenizer_path)
    return manifest


def _require_once(name: str, train: Sequence[Path], valid: Sequence[Path]) -> None:
    paths = [[path.resolve() for path in some] for some in (train, valid)]
    for some in paths:
        twice = next((path for path in some if some.count(path) > 1), None)
        if twice is not None:
            raise DataError(f"{name} names {twice} twice: its tokens would be counted twice.", "Name each file once.")
    both = next((path for path in paths[0] if path in paths[1]), None)
    if both is not None:
        raise DataError(
            f"{name} names {both} for training and for validation: held-out loss would be of learned text.",
            "Name another pair of files with --valid.",
        )


def _shard(path: Path, folder: Path, new: Path, name: str, vocab_size: int, progress: Callable[[Path], None]) -> Shard:
    progress(path)
    index = IndexedTokens(path)
    index.index.require_sound()
    ends = [(int(part.min()), int(part.max())) for part in _parts(index.tokens)]
    smallest, largest = min(low for low, _ in ends), max(high for _, high in ends)
    if smallest < 0 or largest >= vocab_size:
        raise DataError(
            f"{path}.bin has the token {smallest if smallest < 0 else largest:,}; the tokenizer's vocabulary is "
            f"{vocab_size:,}.",
            "Name the tokenizer that made the file.",
        )
    return describe(
        path, new / f"{name}.sums", file=os.path.relpath(path.resolve(), folder.resolve()),
        documents=index.num_documents, tokens=index.num_tokens, dtype=index.tokens.dtype.name,
    )  # fmt: skip


def _parts(tokens: NDArray[np.integer]) -> Iterator[NDArray[np.integer]]:
    size = 1 << 22
    return (tokens[start : start + size] for start in range(0, len(tokens), size))
