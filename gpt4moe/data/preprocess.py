"""Documents -> a data folder: <source>-{train,valid}.bin/.idx by Megatron's own builder, then the manifest.

{"text": ...} lines --read_jsonl--> documents --tokenizer, EOS--> .bin/.idx --all written--> manifest.json
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

from gpt4moe.data.manifest import MANIFEST_NAME, DataManifest, SourceFacts, SplitFacts, file_sha256
from gpt4moe.data.tokenizer import Tokenizer, load_tokenizer
from gpt4moe.errors import DataError

with warnings.catch_warnings():
    # Megatron warns about missing GPU packages while it loads; writing files needs none of them.
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

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


def write_data_folder(folder: Path, sources: dict[str, SourceText], tokenizer_path: Path, progress: Progress) -> None:
    """Tokenizes every source beside `folder`, removes an older manifest, moves the files in, writes the manifest last.

    Raises: DataError for a bad tokenizer, and for a split without a document; `folder` is then unchanged.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        shutil.copyfile(tokenizer_path, Path(beside) / TOKENIZER_NAME)
        facts = {
            name: SourceFacts(
                train=write_split(Path(beside) / f"{name}-train", text.train, tokenizer, progress),
                valid=write_split(Path(beside) / f"{name}-valid", text.valid, tokenizer, progress),
                licence=text.licence,
                description=text.description,
            )
            for name, text in sources.items()
        }
        folder.mkdir(exist_ok=True)
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        for file in Path(beside).iterdir():
            os.replace(file, folder / file.name)
    DataManifest(
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokenizer=TOKENIZER_NAME,
        tokenizer_sha256=file_sha256(folder / TOKENIZER_NAME),
        sources=facts,
    ).write(folder)


def write_split(prefix: Path, documents: Iterable[str], tokenizer: Tokenizer, progress: Progress) -> SplitFacts:
    """Writes <prefix>.bin/.idx by renaming, so that a job that has the older files mapped can go on reading them.

    Raises: DataError when there is no document.
    """
    partial = {suffix: prefix.with_name(f"{prefix.name}{suffix}.tmp") for suffix in (".bin", ".idx")}
    builder = IndexedDatasetBuilder(str(partial[".bin"]), dtype=DType.optimal_dtype(tokenizer.vocab_size))
    num_documents = num_tokens = 0
    for batch in _batches(documents):
        for tokens in tokenizer.encode_batch(batch):
            tokens.append(tokenizer.eos_id)
            builder.add_document(np.asarray(tokens), [len(tokens)])
            num_documents += 1
            num_tokens += len(tokens)
        progress(sum(map(len, batch)))
    builder.finalize(str(partial[".idx"]))
    if not num_documents:
        raise DataError(f"There is no document for {prefix.name}.", "Give more text, or a larger held-out share.")
    facts = SplitFacts(documents=num_documents, tokens=num_tokens, bin_sha256=file_sha256(partial[".bin"]))
    for suffix, path in partial.items():
        os.replace(path, prefix.with_name(prefix.name + suffix))
    return facts


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
