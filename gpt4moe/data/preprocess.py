"""Documents -> a source of a data folder: shards of .bin/.idx by Megatron's own builder, then the source's manifest.

{"text": ...} lines --read_jsonl--> documents --tokenizer, EOS--> shards --all written--> manifest.json
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt4moe.data.folder import finish_folder, new_source, vocabulary_of
from gpt4moe.data.manifest import Shard, SourceManifest
from gpt4moe.data.shards import describe
from gpt4moe.data.tokenizer import Tokenizer, load_tokenizer
from gpt4moe.errors import DataError

with warnings.catch_warnings():
    # Megatron warns about missing GPU packages while it loads; writing files needs none of them.
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

SHARD_BYTES = 4_000_000_000
"""Of a .bin; a shard ends with the document that passes it."""
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
    tokenizer = load_tokenizer(tokenizer_path)
    vocabulary = vocabulary_of(folder, tokenizer, tokenizer_path)
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


def read_jsonl(paths: list[Path]) -> Iterator[str]:
    """The "text" of each line, file after file.

    Raises: DataError naming file and line of a line that is not {"text": "..."}.
    """
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is missing.", "Name an existing file of one JSON object a line.")
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _text_of(line, f"{path}:{number}")


def jsonl_source(paths: list[Path], *, held_out_share: float, licence: str) -> SourceText:
    """A source of JSON lines; the files are read twice, once for each split."""
    return SourceText(
        train=(text for text in read_jsonl(paths) if not held_out(text, held_out_share)),
        valid=(text for text in read_jsonl(paths) if held_out(text, held_out_share)),
        licence=licence,
        description=", ".join(path.name for path in paths),
    )


def held_out(document: str, share: float) -> bool:
    """Whether a document is held out: by its hash, so that copies of it are all in the same split."""
    digest = hashlib.sha256(document.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2.0**64


def _text_of(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{where} is no {{"text": ...}} object.', "Write one JSON object with a text a line."
        ) from error
    if not isinstance(text, str):
        raise DataError(f"{where} has a text that is no string.", "Write one JSON object with a text a line.")
    return text


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
