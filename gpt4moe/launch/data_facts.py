"""Is the data here, and is it the same as on the other ranks? A fingerprint of what every rank opens. No torch."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt4moe.config.data import DataKind
from gpt4moe.config.run import RunConfig
from gpt4moe.data.check import SPLITS, check_data, data_folder, tokenizer_path
from gpt4moe.data.manifest import MANIFEST_NAME, DataManifest
from gpt4moe.errors import DataError

BLOCKS = 16
"""Read of every file, evenly spaced from its first to its last: terabytes cannot be read whole before each start."""
BLOCK_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFacts:
    """What one rank found."""

    fingerprint: str
    """Of the manifest, the tokenizer, and size and blocks of every token file and index; empty when unreadable."""
    cause: str = ""
    cure: str = ""


def data_facts(run: RunConfig) -> DataFacts:
    """Opens what the trainer would open, by its own check, and reads blocks of it."""
    try:
        check_data(run)
        digest = hashlib.sha256()
        for path in data_files(run):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            for block in _blocks(path):
                digest.update(block)
    except DataError as error:
        return DataFacts(fingerprint="", cause=error.cause, cure=error.cure)
    except OSError as error:
        cure = "Check that every node mounts the file system, and that this user may read there."
        return DataFacts(fingerprint="", cause=f"{error.filename} cannot be read: {error.strerror}.", cure=cure)
    return DataFacts(fingerprint=digest.hexdigest()[:16])


def data_files(run: RunConfig) -> list[Path]:
    """In one order on every rank; none for synthetic tokens."""
    tokenizer = tokenizer_path(run)
    files = [tokenizer] if tokenizer is not None else []
    if run.data.kind is DataKind.mock:
        return files
    folder = data_folder(run)
    sources = DataManifest.read(folder).shares(run.data.sources)
    names = [f"{source}-{split}.{suffix}" for source in sources for split in SPLITS for suffix in ("idx", "bin")]
    return [folder / MANIFEST_NAME, *files, *(folder / name for name in names)]


def _blocks(path: Path) -> Iterator[bytes]:
    last = max(0, path.stat().st_size - BLOCK_BYTES)
    with path.open("rb") as stream:
        for place in sorted({last * block // (BLOCKS - 1) for block in range(BLOCKS)}):
            stream.seek(place)
            yield stream.read(BLOCK_BYTES)
