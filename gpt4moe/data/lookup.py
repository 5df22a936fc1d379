"""Where a sample of a run comes from: source, epoch, file, document; and whether files are what their manifest says."""

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt4moe.config.run import RunConfig
from gpt4moe.data.blocks import BLOCK_BYTES, INDEX_BLOCK_BYTES, damaged_block, hash_blocks
from gpt4moe.data.catalogue import Catalogue, Source
from gpt4moe.data.check import CheckedData
from gpt4moe.data.image_files import verify_images
from gpt4moe.data.indexed import IndexedTokens
from gpt4moe.data.loader import build_data
from gpt4moe.data.manifest import SPLITS, Shard
from gpt4moe.data.mixed import MixedSamples
from gpt4moe.data.rows import RowSamples
from gpt4moe.data.shards import bin_path, idx_path, require_files, sums_path
from gpt4moe.errors import DataError

_STRETCH = 1 << 20
"""Tokens that are read at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Of one sample."""

    sample: int
    source: str
    epoch: int
    position: int
    """In the order of this epoch."""
    file: str
    """The .bin of its first token."""
    document: int
    """The document of its first token, in that file."""
    token_in_document: int
    tokens_md5: str
    """Of its S + 1 tokens as little-endian int64."""


def origin_of(run: RunConfig, checked: CheckedData, n: int) -> tuple[Origin, list[int]]:
    """Sample n of a run, counted from 0, and its tokens. Raises: DataError for synthetic tokens, and as build_data."""
    samples = build_data(run, checked).train.samples
    if not isinstance(samples, MixedSamples | RowSamples):
        raise DataError("data=mock has no files.", "Choose data=demo, or data.path=FOLDER with data.kind=indexed.")
    draw, index = samples.place(n)
    if isinstance(samples, RowSamples):
        stream, start = samples.sources[draw.source].token(index)
    else:
        stream, start = samples.streams[draw.source], index * samples.length_of(draw)
    shard, at = stream.place(start)
    document, within = stream.index(stream.shards.index(shard)).document_at(at)
    tokens = samples.sample(n).tokens
    origin = Origin(
        sample=n, source=draw.source, epoch=draw.epoch, position=draw.position,
        file=str(bin_path(stream.folder, shard)), document=document, token_in_document=within,
        tokens_md5=hashlib.md5(tokens.astype("<i8").tobytes(), usedforsecurity=False).hexdigest(),
    )  # fmt: skip
    return origin, tokens.tolist()


def all_shards(catalogue: Catalogue) -> Iterator[tuple[Source, Shard]]:
    for source in catalogue.sources.values():
        for split in SPLITS:
            for shard in (*source.manifest.shards(split), *source.manifest.masks.get(split, ())):
                yield source, shard


def verify_shard(source: Source, shard: Shard, vocab_size: int, progress: Callable[[int], None]) -> list[str]:
    """What is wrong with a shard: every byte of its files is read.

    Args:
        progress: called with the number of bytes just read.
    """
    try:
        require_files(source.folder, shard)
        index = IndexedTokens(source.folder / shard.file)
    except DataError as error:
        return [error.cause]
    found, sums = [], np.fromfile(sums_path(source.folder, shard), dtype="<u4")
    num_sums = len(sums) - shard.idx_blocks
    path = idx_path(source.folder, shard)
    sha256, of_index = hash_blocks(path, INDEX_BLOCK_BYTES)
    if sha256 != shard.idx_sha256:
        found.append(f"{path} is not the index that was written.")
    elif shard.idx_blocks and of_index != sums[num_sums:].tolist():
        found.append(f"{sums_path(source.folder, shard)} has other sums than those of {path}.")
    if index.num_documents != shard.documents:
        found.append(f"{index.prefix}.idx has {index.num_documents:,} documents, the manifest {shard.documents:,}.")
    return found + _verify_tokens(source.folder, shard, sums[:num_sums], vocab_size, progress)


def verify_images_of(source: Source, progress: Callable[[int], None]) -> list[str]:
    """What is wrong with the images of a source and their tables: all are read."""
    images = source.manifest.images
    if images is None:
        return []
    found = []
    for split in SPLITS:
        for shard in images.shards[split]:
            found += verify_images(source.folder, shard, progress)
        try:
            known, _ = source.frames(split).tokens_and_lengths()
            stream = source.tokens(split)
            there = [
                np.flatnonzero(stream[first : first + _STRETCH] == images.image_id) + first
                for first in range(0, len(stream), _STRETCH)
            ]
            if not np.array_equal(np.concatenate(there), known):
                found.append(f"{source.folder}: the frames of {split} are not those of its image tokens.")
        except DataError as error:
            found.append(error.cause)
    return found


def _verify_tokens(
    folder: Path, shard: Shard, sums: NDArray[np.uint32], vocab_size: int, progress: Callable[[int], None]
) -> list[str]:
    path, digest, found, largest = bin_path(folder, shard), hashlib.sha256(), [], 0
    with path.open("rb") as stream:
        for block, sum_ in enumerate(sums):
            content = stream.read(BLOCK_BYTES)
            digest.update(content)
            if zlib.crc32(content) != sum_:
                found.append(damaged_block(path, block, BLOCK_BYTES, "").cause)
            largest = max(largest, int(np.frombuffer(content, dtype=shard.dtype).max()))
            progress(len(content))
    is_written = digest.hexdigest() == shard.bin_sha256
    if found and is_written:
        found = [f"{sums_path(folder, shard)} has other sums than those of {path}."]
    elif not found and not is_written:
        found.append(f"{path} is not the file that was written: its sha256 is another one.")
    if largest >= vocab_size:
        found.append(f"{path} has the token {largest:,}; the vocabulary has {vocab_size:,}.")
    return found
