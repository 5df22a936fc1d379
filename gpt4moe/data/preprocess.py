"""Documents -> a source of a data folder: shards of .bin/.idx by Megatron's own builder, then the source's manifest.

documents --tokenizer, EOS--> shards --all written--> manifest.json

For documents that a program holds, as the demo does. A user's files go through gpt4moe/corpus, to the same bytes.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt4moe.data.folder import finish_folder, new_source, require_source_name, vocabulary_of
from gpt4moe.data.indexed_writer import SHARD_BYTES
from gpt4moe.data.manifest import Shard, SourceManifest
from gpt4moe.data.shards import describe
from gpt4moe.data.tokenizer import Tokenizer, load_tokenizer
from gpt4moe.errors import DataError

with warnings.catch_warnings():
    # Megatron warns about missing GPU packages while it loads; writing files needs none of them.
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

_BATCH_CHARACTERS = 1 << 21

Progress = Callable[[int], None]
"""Called with the number of characters just tokenized."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceText:
    """The documents of one source; each iterable is read once."""

    train: Iterable[str]
    valid: Iterable[str]
    licence: str
    description: str


def write_data_folder(
    folder: Path, sources: dict[str, SourceText], tokenizer_path: Path, progress: Progress,
    *, shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Writes these sources in place of older ones of their names, and touches no other. A folder that is new gets its
    manifest last, so one with a manifest has all of them.

    Raises: DataError for a bad tokenizer, another one than the folder's, and for a split without a document. Sources
    that come before it are written then.
    """
    for name in sources:
        require_source_name(name)
    tokenizer = load_tokenizer(tokenizer_path)
    vocabulary = vocabulary_of(folder, tokenizer, tokenizer_path, replaced=list(sources))
    for name, text in sources.items():
        write_source(folder / name, text, tokenizer, vocabulary.tokenizer_sha256, progress, shard_bytes=shard_bytes)
    finish_folder(folder, vocabulary, tokenizer_path)


def write_source(
    folder: Path, text: SourceText, tokenizer: Tokenizer, tokenizer_sha256: str, progress: Progress, *, shard_bytes: int
) -> None:
    """Writes a source in place of an older one. Raises: DataError when a split has no document; the older one stays."""
    with new_source(folder) as new:
        SourceManifest(
            tokenizer_sha256=tokenizer_sha256,
            licence=text.licence,
            description=text.description,
            train=write_split(new / "train", text.train, tokenizer, progress, shard_bytes=shard_bytes),
            valid=write_split(new / "valid", text.valid, tokenizer, progress, shard_bytes=shard_bytes),
        ).write(new)


def write_split(
    prefix: Path, documents: Iterable[str], tokenizer: Tokenizer, progress: Progress, *, shard_bytes: int = SHARD_BYTES
) -> list[Shard]:
    """Writes <prefix>-00000.{bin,idx,sums} and on. Raises: DataError when there is no document."""
    shards: list[Shard] = []
    writer: _ShardWriter | None = None
    for batch in _batches(documents):
        for tokens in tokenizer.encode_batch(batch):
            if writer is None:
                writer = _ShardWriter(prefix.with_name(f"{prefix.name}-{len(shards):05}"), tokenizer)
            writer.add(tokens)
            if writer.num_bytes >= shard_bytes:
                shards.append(writer.finish())
                writer = None
        progress(sum(map(len, batch)))
    if writer is not None:
        shards.append(writer.finish())
    if not shards:
        raise DataError(
            f"There is no document for {prefix.name}.",
            "Give more text, or a larger held-out share.",
        )
    return shards


class _ShardWriter:
    """One shard that is being written."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer):
        self.prefix, self.eos_id = prefix, tokenizer.eos_id
        self.dtype = np.dtype(DType.optimal_dtype(tokenizer.vocab_size))
        self.builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=self.dtype.type)
        self.num_documents = self.num_tokens = 0

    @property
    def num_bytes(self) -> int:
        return int(self.num_tokens * self.dtype.itemsize)

    def add(self, tokens: list[int]) -> None:
        """A document; EOS comes behind it."""
        self.builder.add_document(np.asarray([*tokens, self.eos_id]), [len(tokens) + 1])
        self.num_documents += 1
        self.num_tokens += len(tokens) + 1

    def finish(self) -> Shard:
        self.builder.finalize(f"{self.prefix}.idx")
        return describe(
            self.prefix, self.prefix.with_suffix(".sums"), file=self.prefix.name,
            documents=self.num_documents, tokens=self.num_tokens, dtype=self.dtype.name,
        )  # fmt: skip


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
