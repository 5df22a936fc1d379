"""Documents -> a source of a data folder: shards of .bin/.idx by Megatron's own builder, then the source's manifest.

{"text": ...} lines --read_jsonl--> documents --tokenizer, EOS--> shards --all written--> manifest.json
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt4moe.data.manifest import MANIFEST_NAME, DataManifest, Shard, SourceManifest, file_sha256
from gpt4moe.data.shards import write_sums
from gpt4moe.data.tokenizer import Tokenizer, load_tokenizer
from gpt4moe.errors import DataError

with warnings.catch_warnings():
    # Megatron warns about missing GPU packages while it loads; writing files needs none of them.
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

SHARD_BYTES = 4_000_000_000
"""Of a .bin; a shard ends with the document that passes it."""
TOKENIZER_NAME = "tokenizer.json"
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
    manifest = _vocabulary(folder, tokenizer, tokenizer_path)
    for name, text in sources.items():
        write_source(folder / name, text, tokenizer, manifest.tokenizer_sha256, progress, shard_bytes=shard_bytes)
    if not (folder / MANIFEST_NAME).is_file():
        if tokenizer_path.resolve() != (folder / TOKENIZER_NAME).resolve():
            shutil.copyfile(tokenizer_path, folder / TOKENIZER_NAME)
        manifest.write(folder)


def _vocabulary(folder: Path, tokenizer: Tokenizer, tokenizer_path: Path) -> DataManifest:
    """The folder's manifest, of this tokenizer. Raises: DataError when the folder has another tokenizer."""
    digest = file_sha256(tokenizer_path)
    if (folder / MANIFEST_NAME).is_file():
        manifest = DataManifest.read(folder)
        if manifest.tokenizer_sha256 != digest:
            raise DataError(
                f"The sources of {folder} were made by another tokenizer than {tokenizer_path}.",
                f"Use {folder / manifest.tokenizer}, or write to another folder.",
            )
        return manifest
    return DataManifest(
        vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, tokenizer=TOKENIZER_NAME, tokenizer_sha256=digest
    )


def write_source(
    folder: Path, text: SourceText, tokenizer: Tokenizer, tokenizer_sha256: str, progress: Progress, *, shard_bytes: int
) -> None:
    """Writes a source beside its folder, then in place of an older one. A job that reads the older one goes on with
    the shards that it has mapped.

    Raises: DataError when a split has no document; an older source is then unchanged.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        new = Path(beside) / "new"
        new.mkdir()
        SourceManifest(
            tokenizer_sha256=tokenizer_sha256,
            licence=text.licence,
            description=text.description,
            train=write_split(new / "train", text.train, tokenizer, progress, shard_bytes=shard_bytes),
            valid=write_split(new / "valid", text.valid, tokenizer, progress, shard_bytes=shard_bytes),
        ).write(new)
        if folder.exists():
            os.replace(folder, Path(beside) / "old")
        os.replace(new, folder)


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
        index = Path(f"{self.prefix}.idx")
        self.builder.finalize(str(index))
        return Shard(
            file=self.prefix.name, documents=self.num_documents, tokens=self.num_tokens, dtype=self.dtype.name,
            bin_sha256=write_sums(Path(f"{self.prefix}.bin"), Path(f"{self.prefix}.sums")),
            idx_bytes=index.stat().st_size, idx_sha256=file_sha256(index),
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
