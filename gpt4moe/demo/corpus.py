"""Makes the demo's data folder from text and code of this machine: `python -m gpt4moe.demo.corpus --out data/demo`

    sources --normalise, deduplicate, split--> documents --train_tokenizer--> tokenizer.json
                                               documents --write_data_folder--> shards, corpus.json, manifests

A folder with the same vocabulary and all sources is complete, and is used again.
"""

import argparse
import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from gpt4moe.data.catalogue import Catalogue
from gpt4moe.data.manifest import MANIFEST_NAME, SourceManifest, write_json
from gpt4moe.data.tokenizer import require_vocabulary, train_tokenizer
from gpt4moe.demo.sources import Document, prose_sources, python_sources
from gpt4moe.errors import DataError, Gpt4MoeError

logger = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.025
SMALLEST_DOCUMENT = 200
"""Characters; shorter documents are dropped."""
LISTING_NAME = "corpus.json"
"""Each document with its source, path, licence and hash."""
_TOKENIZER_BYTES = 12_000_000
_DESCRIPTIONS = {
    "python": "Python standard library sources and tests of this machine",
    "prose": "pydoc topics and docstrings of the Python packages of this machine",
}
SOURCES: dict[str, Callable[[], Iterable[Document]]] = {"python": python_sources, "prose": prose_sources}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A document of the corpus, and whether it is held out."""

    document: Document
    sha256: str
    """Hash of the normalised text."""
    held_out: bool


def build_demo_corpus(
    folder: Path,
    *,
    vocab_size: int = 4096,
    sources: dict[str, Callable[[], Iterable[Document]]] | None = None,
    console: Console | None = None,
) -> Catalogue:
    """Makes the data folder, unless a complete one with this vocabulary is there.

    Args:
        sources: name -> reader of its documents; by default what this machine has.
    Raises: DataError when there is too little text for the vocabulary.
    """
    console = console or Console(quiet=True)
    require_vocabulary(vocab_size)
    sources = sources or SOURCES
    catalogue = _existing(folder, sources)
    if catalogue is not None and catalogue.vocabulary.vocab_size == vocab_size:
        console.print(f"{folder}: reusing {_summary(catalogue)}.")
        return catalogue
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    _remove_damaged_sources(folder)
    with _bar(console) as phase:
        with phase("collect", None):
            entries = {name: split(read()) for name, read in sources.items()}
        size = sum(len(entry.document.text) for group in entries.values() for entry in group)
        with phase("tokenizer", None):
            train_tokenizer(_tokenizer_sample(entries), vocab_size=vocab_size).backend.save(
                str(folder / "tokenizer.json")
            )
        with phase("tokenize", size) as advance:
            _write(folder, entries, advance)
    catalogue = Catalogue.open([folder])
    console.print(f"{folder}: made {_summary(catalogue)}.")
    return catalogue


def split(documents: Iterable[Document], *, held_out_share: float = HELD_OUT_SHARE) -> list[Entry]:
    """Documents normalised, sorted by path, without copies and very short ones; some held out, chosen by hash."""
    unique: dict[str, Document] = {}
    for document in sorted(documents, key=lambda document: document.path):
        text = normalised(document.text)
        if len(text) >= SMALLEST_DOCUMENT:
            digest = hashlib.sha256(text.encode()).hexdigest()
            unique.setdefault(digest, Document(path=document.path, text=text, licence=document.licence))
    budget = held_out_share * sum(len(document.text) for document in unique.values())
    held_out = set()
    for digest in sorted(unique):
        # A document larger than the rest of the budget is skipped, so that the share is never overshot.
        if len(unique[digest].text) <= budget:
            held_out.add(digest)
            budget -= len(unique[digest].text)
    return [Entry(document=document, sha256=key, held_out=key in held_out) for key, document in unique.items()]


def normalised(text: str) -> str:
    """One kind of line end, no spaces at line ends, one final newline."""
    return (
        "\n".join(line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")).strip("\n")
        + "\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 made or reused, 2 bad input or too little text on this machine."""
    parser = argparse.ArgumentParser(prog="python -m gpt4moe.demo.corpus", description="Build the demo's data folder.")
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="folder to make (default: data/demo)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="entries of the tokenizer (default: 4096)")
    options = parser.parse_args(arguments)
    try:
        build_demo_corpus(options.out, vocab_size=options.vocab_size, console=Console(stderr=True, soft_wrap=True))
    except Gpt4MoeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _existing(folder: Path, names: Iterable[str]) -> Catalogue | None:
    """The sources of a complete folder; None where something is missing or damaged, so that it is made again."""
    try:
        catalogue = Catalogue.open([folder])
        catalogue.require_whole()
    except DataError as error:
        logger.info("%s", error.cause)
        return None
    return catalogue if set(names) <= set(catalogue.sources) else None


def _remove_damaged_sources(folder: Path) -> None:
    """Sources that an earlier build listed in corpus.json are ours: without their manifests they would be taken for
    somebody's files, which nothing replaces."""
    try:
        names = {entry["source"] for entry in json.loads((folder / LISTING_NAME).read_text())}
    except (OSError, ValueError):
        return
    for name in names:
        try:
            SourceManifest.read(folder / name)
        except DataError:
            shutil.rmtree(folder / name, ignore_errors=True)


def _write(folder: Path, entries: dict[str, list[Entry]], advance: Callable[[int], None]) -> None:
    # Imported here: Megatron takes seconds to load, and a folder that is reused does not need it.
    from gpt4moe.data.preprocess import SourceText, write_data_folder

    listing = [
        {
            "source": name,
            "path": entry.document.path,
            "licence": entry.document.licence,
            "sha256": entry.sha256,
            "bytes": len(entry.document.text.encode()),
            "split": "valid" if entry.held_out else "train",
        }
        for name, group in entries.items()
        for entry in group
    ]
    write_json(folder / LISTING_NAME, listing)
    texts = {
        name: SourceText(
            train=[entry.document.text for entry in group if not entry.held_out],
            valid=[entry.document.text for entry in group if entry.held_out],
            licence=_common_licence(group),
            description=_DESCRIPTIONS.get(name, name),
        )
        for name, group in entries.items()
    }
    write_data_folder(folder, texts, folder / "tokenizer.json", advance)


def _common_licence(entries: list[Entry]) -> str:
    found = {entry.document.licence for entry in entries}
    return found.pop() if len(found) == 1 else "several: see corpus.json"


def _tokenizer_sample(entries: dict[str, list[Entry]]) -> Iterator[str]:
    """About _TOKENIZER_BYTES of training documents, each source by its size, in the order of their hashes."""
    total = sum(len(entry.document.text) for group in entries.values() for entry in group)
    for group in entries.values():
        budget = _TOKENIZER_BYTES * sum(len(entry.document.text) for entry in group) / total
        for entry in sorted(group, key=lambda entry: entry.sha256[::-1]):
            if budget > 0 and not entry.held_out:
                budget -= len(entry.document.text)
                yield entry.document.text


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]]:
    """Progress bars; yields a function that opens one named phase, whose time stays on the screen."""
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:

        @contextmanager
        def phase(name: str, total: int | None) -> Iterator[Callable[[int], None]]:
            task = progress.add_task(name, total=total)
            start = time.perf_counter()
            yield lambda amount: progress.advance(task, amount)
            progress.update(task, total=total or 1, completed=total or 1)
            logger.info("%s took %.1f s", name, time.perf_counter() - start)

        yield phase


def _summary(catalogue: Catalogue) -> str:
    parts = [
        f"{name} {source.manifest.num_tokens('train') / 1e6:.1f}M tokens" for name, source in catalogue.sources.items()
    ]
    return f"{', '.join(parts)}, vocabulary {catalogue.vocabulary.vocab_size}"


if __name__ == "__main__":
    sys.exit(main())
