"""File facts of a rank: a fingerprint of its data, and the speed of the run's file system. No torch.

data   data_facts() hashes blocks of the files that the trainer would open, to compare them between ranks
disk   rank 0: begin() makes <run.root>/.preflight-xxxxxxxx/
       all ranks at once, as in a save: write() times a file; sees() looks for rank 0's file; end() removes the folder
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt4moe.config.run import RunConfig
from gpt4moe.data.check import check_data
from gpt4moe.data.manifest import MANIFEST_NAME, SPLITS
from gpt4moe.data.shards import bin_path, idx_path, sums_path
from gpt4moe.errors import DataError

MOST_BYTES = 64 << 20
LEAST_BYTES = 4 << 20
"""A smaller file would measure one fsync, not a speed."""
SEEN_WITHIN_SECONDS = 10.0
"""A network file system may show an old directory listing for some seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskFacts:
    """Facts of the file system of run.root, as one rank sees it."""

    free_bytes: int = 0
    """Free space for this user; quotas are not known."""
    bytes_per_second: float = 0.0
    """Bytes per second of writing and syncing, while all other ranks write too."""
    sees_first: bool = False
    """Whether this rank sees rank 0's file, as on a shared file system."""
    problem: str = ""


def begin(run: RunConfig) -> tuple[str, str]:
    """Makes the folder. Returns: its path and "", or "" and why it cannot be made."""
    root = Path(run.run.root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix=".preflight-", dir=root), ""
    except OSError as error:
        return "", f"{root} cannot be written: {error.strerror}"


def write(folder: Path, rank: int, size_bytes: float) -> DiskFacts:
    """Writes this rank's file and syncs it.

    Args:
        size_bytes: size of this rank's part of a checkpoint; at most MOST_BYTES are written.
    """
    size = int(min(MOST_BYTES, max(LEAST_BYTES, size_bytes)))
    block = os.urandom(1 << 20)  # zeros might be compressed away
    try:
        folder.mkdir(parents=True, exist_ok=True)  # if the root is not shared, this node has no such folder yet
        free = shutil.disk_usage(folder).free
        if free < 2 * size:
            return DiskFacts(free_bytes=free, problem=f"{free / 1e9:.3g} GB free, too little for a test file")
        started = time.perf_counter()
        with probe_file(folder, rank).open("wb") as file:
            for _ in range(size // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
    except OSError as error:
        return DiskFacts(problem=f"{folder.parent} cannot be written: {error.strerror}")
    return DiskFacts(free_bytes=free, bytes_per_second=size // len(block) * len(block) / seconds)


def sees(path: Path, within_seconds: float = SEEN_WITHIN_SECONDS) -> bool:
    """Whether a file that another rank has written becomes visible to this one."""
    deadline = time.monotonic() + within_seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
        try:
            os.listdir(path.parent)  # makes a network file system refresh the listing
        except OSError:
            continue
    return True


def probe_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}"


def end(folder: Path) -> None:
    """Removes the folder. Every rank calls it, because a folder that is not shared exists on each node."""
    shutil.rmtree(folder, ignore_errors=True)


BLOCKS = 16
"""Number of evenly spaced blocks that are read of every file; terabytes would take too long before each launch."""
BLOCK_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFacts:
    """Facts of the run's data, as one rank sees it."""

    fingerprint: str
    """Hash of manifests, tokenizer, and size and blocks of every token file and index; empty if unreadable."""
    cause: str = ""
    cure: str = ""


def data_facts(run: RunConfig) -> DataFacts:
    """Opens the files that the trainer would open, with the trainer's check, and hashes blocks of them."""
    try:
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
    """The files that the run reads, in the same order on every rank. Raises: DataError as the trainer's check does."""
    has_begun = (Path(run.run.root) / run.run.name / "identity.json").exists()
    checked = check_data(run, is_new=not has_begun)
    files = [checked.tokenizer] if checked.tokenizer is not None else []
    catalogue = checked.catalogue
    if catalogue is None:
        return files
    files = [*(folder / MANIFEST_NAME for folder in catalogue.folders), *files]
    for source in (catalogue.sources[name] for name in checked.source_names):
        files.append(source.folder / MANIFEST_NAME)
        for shard in (shard for split in SPLITS for shard in source.manifest.shards(split)):
            files += [of(source.folder, shard) for of in (idx_path, sums_path, bin_path)]
    return files


def _blocks(path: Path) -> Iterator[bytes]:
    last = max(0, path.stat().st_size - BLOCK_BYTES)
    with path.open("rb") as stream:
        for place in sorted({last * block // (BLOCKS - 1) for block in range(BLOCKS)}):
            stream.seek(place)
            yield stream.read(BLOCK_BYTES)
