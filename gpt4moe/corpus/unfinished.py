"""The work on a source that is not finished: one command at a time, its plan, and which of its pieces are whole."""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from gpt4moe.config.checksums import file_sha256
from gpt4moe.corpus.inputs import Inputs
from gpt4moe.corpus.piece import PieceFacts, Recipe, piece_path
from gpt4moe.corpus.records import Part
from gpt4moe.data.manifest import MANIFEST_NAME, SourceManifest, write_json
from gpt4moe.data.shards import bin_path, idx_path, require_files
from gpt4moe.errors import DataError

_LOCK_SECONDS = 5.0


def make_plan(
    inputs: Inputs, recipe: Recipe, pieces: Sequence[Sequence[Part]], others: Sequence[object]
) -> dict[str, Any]:
    """Hashes of what each piece is made of, and of all that the source is made of: `others` beside its pieces."""
    changed = {path: changed for path, _, _, changed in inputs.files}
    # Not where the tokenizer lies: its hash is in the recipe too.
    said = {key: value for key, value in dataclasses.asdict(recipe).items() if key != "tokenizer"}
    keys = [_sha256([said, [[*dataclasses.astuple(p), changed[p.path]] for p in piece]]) for piece in pieces]
    return {"sha256": _sha256([keys, *others]), "pieces": keys}


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def made_already(folder: Path, plan: dict[str, Any]) -> SourceManifest | None:
    """A source that was made, or extended, by this plan, and is whole."""
    if not (folder / MANIFEST_NAME).is_file():
        return None
    manifest = SourceManifest.read(folder)
    text = dict(manifest.text or {})
    known = (text, *text.get("extensions", ()))
    if all(one.get("plan_sha256") != plan["sha256"] for one in known):
        return None
    return manifest if are_whole(folder, manifest) else None


def are_whole(folder: Path, manifest: SourceManifest) -> bool:
    """Whether a source's shards are those that were written: every byte is read."""
    try:
        for shard in (*manifest.train, *manifest.valid):
            require_files(folder, shard)
            wanted = ((bin_path(folder, shard), shard.bin_sha256), (idx_path(folder, shard), shard.idx_sha256))
            if any(file_sha256(path) != digest for path, digest in wanted):
                return False
    except DataError:
        return False
    return True


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Makes `work`, and removes it at the end where nothing but the lock is in it.

    Raises: DataError while another command makes this source. A command that was killed has let go.
    """
    until = time.monotonic() + _LOCK_SECONDS
    while (stream := _lock(work)) is None:
        if time.monotonic() > until:
            raise DataError(f"Another command is writing {work}.", "Wait for it, or end it.")
        time.sleep(0.1)
    with stream:
        try:
            yield
        finally:
            with suppress(OSError):  # a command that waits may make its own lock between the two removals
                if os.listdir(work) == ["lock"]:
                    (work / "lock").unlink()
                    work.rmdir()


def _lock(work: Path) -> TextIO | None:
    """The lock's file, or None: another command has it, or has just removed it."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "lock"
    try:
        stream = path.open("w")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(stream.fileno()), path.stat()):
            return stream
    except OSError:
        pass
    stream.close()
    return None


def clear(work: Path) -> None:
    """Removes everything but the lock, which its holder removes last."""
    for item in work.iterdir():
        if item.name != "lock":
            _remove(item)


def _remove(item: Path) -> None:
    """A source may have been a link to a folder elsewhere, which stays."""
    if item.is_dir() and not item.is_symlink():
        shutil.rmtree(item)
    else:
        item.unlink()


def begin(work: Path, plan: dict[str, Any], say: Callable[[str], None]) -> None:
    """Keeps what is finished of the same plan, and the pieces of another one whose files and recipe are the same."""
    path = work / "plan.json"
    try:
        is_same = json.loads(path.read_text(encoding="utf-8"))["sha256"] == plan["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        is_same = False
    if not is_same:
        path.unlink(missing_ok=True)
        for item in work.iterdir():
            if item.is_dir() or (item.name != "lock" and not item.name.startswith("piece-")):
                _remove(item)
    if not any(work.glob("shard-*.json")):  # then the tokens of pieces are all there still
        for number, key in enumerate(plan["pieces"]):
            _require_piece(work, number, key)
    if not is_same:
        write_json(path, plan)
    done = sum(piece_path(work, number, "json").exists() for number in range(len(plan["pieces"])))
    if done:
        say(f"{work}: going on, {done} of {len(plan['pieces'])} pieces are finished")


def _require_piece(work: Path, number: int, key: str) -> None:
    """A piece of other files or another recipe, or one whose files are not whole, is not finished."""
    path = piece_path(work, number, "json")
    try:
        facts = PieceFacts.read(path)
        sizes = {suffix: piece_path(work, number, suffix).stat().st_size for suffix in facts.sizes}
        if facts.key == key and sizes and sizes == facts.sizes:
            return
    except (OSError, ValueError, TypeError):
        pass
    path.unlink(missing_ok=True)
