"""A source of a data folder from files: planned, made piece by piece, checked, moved in place. Goes on after kill -9.

    inputs --cut--> pieces --processes--> token files --duplicates out--> shards --manifest--> FOLDER/NAME

FOLDER/.NAME.work holds what is finished: the same command goes on from there, another one begins anew. Every file of
the result depends on the inputs and the recipe alone: not on processes, pieces or restarts.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt4moe.corpus.assemble import STAYS, Documents, ShardTask, plan_shards, read_shard, shard_json, write_shard
from gpt4moe.corpus.duplicates import mark_first
from gpt4moe.corpus.inputs import Inputs, cut
from gpt4moe.corpus.piece import Kitchen, PieceFacts, Recipe, make_piece, piece_path
from gpt4moe.corpus.quality import Quality, require_language
from gpt4moe.corpus.records import Advance, Part
from gpt4moe.corpus.result import commit, manifest_of
from gpt4moe.corpus.workers import Workers
from gpt4moe.data.folder import require_replaceable
from gpt4moe.data.indexed_writer import SHARD_BYTES
from gpt4moe.data.manifest import MANIFEST_NAME, SPLITS, Shard, SourceManifest, file_sha256, write_json
from gpt4moe.data.shards import bin_path, idx_path, require_files
from gpt4moe.errors import DataError

_CHECK_TOKENS = 1_000_000
"""From which on a source that makes no sense is refused before all of it is read."""
_LOCK_SECONDS = 5.0

Bar = Callable[[str, int], AbstractContextManager[Advance]]
"""Name and number of bytes -> progress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """A source to make."""

    name: str
    inputs: Inputs
    recipe: Recipe
    dtype: np.dtype[Any]
    """Of a token in .bin (data.indexed_writer.token_dtype)."""
    licence: str
    accept_nonsense: bool = False
    shard_bytes: int = SHARD_BYTES
    piece_bytes: int | None = None
    """None: by the size of the inputs."""


def build_source(folder: Path, order: Order, *, processes: int, bar: Bar, say: Callable[[str], None]) -> SourceManifest:
    """Makes a source in place of an older one; one that this very order has made already stays.

    Raises: DataError for documents that cannot be read, for nonsense, and for a split without a document.
    """
    pieces = cut(order.inputs, order.piece_bytes)
    plan = _plan(order, pieces)
    require_replaceable(folder / order.name)
    _require_elsewhere(order, folder / order.name)
    made = _made_already(folder / order.name, plan)
    if made is not None:
        shutil.rmtree(folder / f".{order.name}.work", ignore_errors=True)  # of a kill amid its removal
        say(f"{order.name}: made already by the same command, its files are whole")
        return made
    work = folder / f".{order.name}.work"
    with _locked(work):
        _begin(work, plan, order.dtype.itemsize, say)
        with Workers(processes, order.recipe) as workers:
            with bar(order.name, order.inputs.num_bytes) as advance:
                facts = _make_pieces(work, order, pieces, plan["pieces"], workers, advance)
                hashed = ((work, number, path) for number, path in enumerate(_single(order.inputs)))
                hashes = list(workers.map(_hash_input, hashed, advance))
            counts = [sum(one.documents.values()) for one in facts]
            if order.recipe.deduplicate and not (work / STAYS).exists():
                keys = (piece_path(work, number, "keys").read_bytes() for number in range(len(pieces)))
                mark_first(keys, sum(counts), work / STAYS)
            num_bytes = order.dtype.itemsize * sum(sum(one.tokens.values()) for one in facts)
            with bar(f"{order.name}: shards", num_bytes) as advance:
                shards = _write_shards(work, order, counts, workers, advance)
        quality = _quality(facts, np.load(work / "counts.npy"))
        manifest = manifest_of(
            order.inputs, order.recipe, order.licence, plan["sha256"], facts, hashes, quality, shards
        )
        commit(work, folder / order.name, facts, manifest)
    return manifest


def _require_elsewhere(order: Order, folder: Path) -> None:
    """Raises: DataError for an input within the source's own folder, which is replaced."""
    paths = (Path(path).resolve() for path, *_ in order.inputs.files)
    within = next((path for path in paths if path.is_relative_to(folder.resolve())), None)
    if within is not None:
        raise DataError(f"{within} lies in {folder}, which is replaced.", "Move it away, or choose another --out.")


def _plan(order: Order, pieces: Sequence[Sequence[Part]]) -> dict[str, Any]:
    changed = {path: changed for path, _, _, changed in order.inputs.files}
    recipe = dataclasses.asdict(order.recipe)
    keys = [_sha256([recipe, [[*dataclasses.astuple(p), changed[p.path]] for p in piece]]) for piece in pieces]
    return {"sha256": _sha256([keys, order.licence, order.shard_bytes]), "pieces": keys}


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _made_already(folder: Path, plan: dict[str, Any]) -> SourceManifest | None:
    if not (folder / MANIFEST_NAME).is_file():
        return None
    manifest = SourceManifest.read(folder)
    if manifest.text is None or manifest.text.get("plan_sha256") != plan["sha256"]:
        return None
    try:
        for shard in (*manifest.train, *manifest.valid):
            require_files(folder, shard)
            for path, wanted in (
                (bin_path(folder, shard), shard.bin_sha256), (idx_path(folder, shard), shard.idx_sha256),
            ):  # fmt: skip
                if file_sha256(path) != wanted:
                    return None
    except DataError:
        return None
    return manifest


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Raises: DataError while another command makes this source. A command that was killed has let go."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as stream:
        until = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > until:
                    raise DataError(f"Another command is writing {work}.", "Wait for it, or end it.") from error
                time.sleep(0.1)
        yield


def _begin(work: Path, plan: dict[str, Any], itemsize: int, say: Callable[[str], None]) -> None:
    """Keeps what is finished of the same plan, and the pieces of another one whose files and recipe are the same."""
    path = work / "plan.json"
    try:
        is_same = json.loads(path.read_text(encoding="utf-8"))["sha256"] == plan["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        is_same = False
    if not is_same:
        path.unlink(missing_ok=True)
        for item in work.iterdir():
            if item.is_dir():
                shutil.rmtree(item)
            elif item.name != "lock" and not item.name.startswith("piece-"):
                item.unlink()
        for number, key in enumerate(plan["pieces"]):
            _require_piece(work, number, key, itemsize)
        write_json(path, plan)
    done = sum(piece_path(work, number, "json").exists() for number in range(len(plan["pieces"])))
    if done:
        say(f"{work}: going on, {done} of {len(plan['pieces'])} pieces are finished")


def _require_piece(work: Path, number: int, key: str, itemsize: int) -> None:
    """A piece of other files or another recipe, or one whose tokens are in shards already, is not finished."""
    path = piece_path(work, number, "json")
    try:
        facts = PieceFacts.read(path)
        sizes = {split: piece_path(work, number, f"{split}.tokens").stat().st_size for split in SPLITS}
        if facts.key == key and all(sizes[split] == itemsize * facts.tokens[split] for split in SPLITS):
            return
    except (OSError, ValueError, TypeError):
        pass
    path.unlink(missing_ok=True)


def _make_pieces(
    work: Path, order: Order, pieces: Sequence[Sequence[Part]], keys: Sequence[str], workers: Workers, advance: Advance
) -> list[PieceFacts]:
    todo = []
    for number, parts in enumerate(pieces):
        if piece_path(work, number, "json").exists():
            advance(sum(part.stop - part.start for part in parts if part.kind != "parquet"))
        else:
            todo.append((work, number, parts, keys[number]))
    done = workers.map(_make_piece, todo, advance)
    facts: list[PieceFacts] = []
    counts, tokens, unknown = np.zeros(0, dtype=np.int64), 0, 0
    waiting = {number for _, number, *_ in todo}
    for number in range(len(pieces)):
        if number in waiting:
            next(done)
        one = PieceFacts.read(piece_path(work, number, "json"))
        facts.append(one)
        tokens += sum(one.tokens.values()) - sum(one.documents.values())
        unknown += one.unknown
        found = np.fromfile(piece_path(work, number, "counts"), dtype="<i8")
        counts = found if not len(counts) else counts + found
        quality = Quality(tokens, unknown, counts)
        if not order.accept_nonsense and (quality.tokens >= _CHECK_TOKENS or number == len(pieces) - 1):
            require_language(order.name, quality)
    np.save(work / "counts.npy", counts)
    return facts


def _quality(facts: Sequence[PieceFacts], counts: Any) -> Quality:
    tokens = sum(sum(one.tokens.values()) - sum(one.documents.values()) for one in facts)
    return Quality(tokens, sum(one.unknown for one in facts), counts)


def _make_piece(kitchen: Kitchen, advance: Advance, work: Path, number: int, parts: Sequence[Part], key: str) -> None:
    make_piece(piece_path(work, number, "json"), parts, key, kitchen, advance)


def _single(inputs: Inputs) -> list[str]:
    """Files that are not hashed as documents."""
    return [path for path, kind, *_ in inputs.files if kind not in ("text", "tree")]


def _hash_input(kitchen: Kitchen, advance: Advance, work: Path, number: int, path: str) -> str:
    kept = work / f"input-{number:06}.sha256"
    if not kept.exists():
        temporary = kept.with_suffix(".part")
        temporary.write_text(file_sha256(Path(path)))
        os.replace(temporary, kept)
    return kept.read_text()


def _write_shards(
    work: Path, order: Order, counts: Sequence[int], workers: Workers, advance: Advance
) -> dict[str, list[Shard]]:
    documents = Documents(work, counts)
    (work / "new").mkdir(exist_ok=True)
    shards: dict[str, list[Shard]] = {}
    for split in SPLITS:
        tasks = plan_shards(documents, split, itemsize=order.dtype.itemsize, shard_bytes=order.shard_bytes)
        if not tasks:
            raise DataError(
                f"Source {order.name}: there is no document for {split}.",
                "Give more text, or a larger --held-out."
                if split == "valid"
                else "Give text, or a smaller --held-out.",
            )
        todo = [task for task in tasks if not shard_json(work, task).exists()]
        given = ((work / "new", task, work, tuple(counts), order.dtype.name) for task in todo)
        for task, _ in zip(todo, workers.map(_write_shard, given, advance), strict=True):
            _forget(work, task)
        shards[split] = [read_shard(work, task) for task in tasks]
    return shards


def _write_shard(
    kitchen: Kitchen, advance: Advance, new: Path, task: ShardTask, work: Path, counts: Sequence[int], dtype: str
) -> None:
    write_shard(new, task, Documents(work, counts), dtype, advance)


def _forget(work: Path, task: ShardTask) -> None:
    """Tokens of pieces that lie before the end of a shard and so in whole shards, whose tasks end in order."""
    for piece in range(task.first_piece, task.last_piece):
        piece_path(work, piece, f"{task.split}.tokens").unlink(missing_ok=True)
