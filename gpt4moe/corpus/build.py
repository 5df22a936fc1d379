"""A source of a data folder from files: planned, made piece by piece, checked, moved in place. Goes on after kill -9.

    inputs --cut--> pieces --processes--> token files --duplicates out--> shards --manifest--> FOLDER/NAME

A source that is extended keeps its shards and gets new ones (extend.py). FOLDER/.NAME.work holds what is finished: the
same command goes on from there, another one begins anew. Every file of the result depends on the inputs and the recipe
alone: not on processes, pieces or restarts.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gpt4moe.config.checksums import file_sha256
from gpt4moe.corpus.assemble import (
    STAYS,
    Documents,
    ShardTask,
    plan_shards,
    read_shard,
    shard_json,
    write_keys,
    write_shard,
)
from gpt4moe.corpus.duplicates import mark_first
from gpt4moe.corpus.extend import (
    Older,
    extended_from,
    inputs_of,
    merged,
    open_older,
    require_extensions_kept,
    require_older_files,
)
from gpt4moe.corpus.grown_tree import without_known, write_lists
from gpt4moe.corpus.inputs import Inputs, cut, require_unchanged
from gpt4moe.corpus.piece import Kitchen, PieceFacts, Recipe, make_piece, piece_path
from gpt4moe.corpus.quality import Quality, require_language
from gpt4moe.corpus.records import Advance, Part
from gpt4moe.corpus.result import commit, lists_of, manifest_of
from gpt4moe.corpus.unfinished import begin, clear, locked, made_already, make_plan
from gpt4moe.corpus.workers import Workers
from gpt4moe.data.folder import require_both_splits
from gpt4moe.data.in_place import finish_move, require_replaceable
from gpt4moe.data.indexed_writer import SHARD_BYTES
from gpt4moe.data.manifest import SPLITS, Shard, SourceManifest
from gpt4moe.durable import sync_file, sync_files
from gpt4moe.errors import DataError

_CHECK_TOKENS = 1_000_000
"""From which on a source that makes no sense is refused before all of it is read."""

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
    licence: str | None
    """None: unknown, or that of the source which is extended."""
    extends: bool = False
    """New shards for a source that is there (extend.py)."""
    accept_nonsense: bool = False
    shard_bytes: int = SHARD_BYTES
    piece_bytes: int | None = None
    """None: by the size of the inputs."""


def build_source(folder: Path, order: Order, *, processes: int, bar: Bar, say: Callable[[str], None]) -> SourceManifest:
    """Makes a source in place of an older one, or extends it; what this very order has made already stays.

    Raises: DataError for documents that cannot be read, for nonsense, and for a split without a document.
    """
    target, work = folder / order.name, folder / f".{order.name}.work"
    with locked(work):  # also while the older source is read, which another command may be extending
        finish_move(target)
        if order.extends:
            order = replace(order, inputs=without_known(order.inputs, target, inputs_of(target)))
            if not order.inputs.files:
                clear(work)  # of a kill amid its removal
                say(f"{order.name}: made of these files already")
                return SourceManifest.read(target)
        pieces = cut(order.inputs, order.piece_bytes)
        require_replaceable(target)
        _require_elsewhere(order, target)
        plans = (_plan(order, pieces, base) for base in (extended_from(target) if order.extends else [None]))
        made = next((found for plan in plans if (found := made_already(target, plan)) is not None), None)
        if made is not None:
            clear(work)  # of a kill amid its removal
            say(f"{order.name}: made already by the same command, its files are whole")
            return made
        older = open_older(target, order.inputs, order.recipe, order.licence) if order.extends else None
        if older is not None:
            require_older_files(older)
        else:
            require_extensions_kept(target, order.inputs)
        plan = _plan(order, pieces, older.text["plan_sha256"] if older is not None else None)
        begin(work, plan, say)
        with Workers(processes, order.recipe) as workers:
            manifest, facts = _make(work, order, pieces, plan, workers, bar, older)
        commit(work, target, facts, manifest, older)
    return manifest


def _make(
    work: Path, order: Order, pieces: Sequence[Sequence[Part]], plan: dict[str, Any], workers: Workers, bar: Bar,
    older: Older | None,
) -> tuple[SourceManifest, list[PieceFacts]]:  # fmt: skip
    """Makes what is not finished."""
    with bar(order.name, order.inputs.num_bytes) as advance:
        facts = _make_pieces(work, order, pieces, plan["pieces"], workers, advance)
        hashed = ((work, number, path) for number, path in enumerate(_single(order.inputs)))
        hashes = list(workers.map(_hash_input, hashed, advance))
    require_unchanged(order.inputs)  # before shards, which take the tokens of good pieces with them
    counts = [sum(one.documents.values()) for one in facts]
    if order.recipe.deduplicate and not (work / STAYS).exists():
        keys = (piece_path(work, number, "keys").read_bytes() for number in range(len(pieces)))
        before = (older.keys(), older.num_keys) if older is not None else ((), 0)
        mark_first(keys, sum(counts), work / STAYS, older=before[0], num_older=before[1])
    num_bytes = order.dtype.itemsize * sum(sum(one.tokens.values()) for one in facts)
    with bar(f"{order.name}: shards", num_bytes) as advance:
        shards = _write_shards(work, order, counts, workers, advance, older)
    return _manifest(work, order, plan, facts, hashes, shards, older), facts


def _plan(order: Order, pieces: Sequence[Sequence[Part]], base: str | None) -> dict[str, Any]:
    """
    Args:
        base: plan_sha256 of the source that is extended.
    """
    others = [order.licence, order.shard_bytes, *([base] if base is not None else [])]
    return make_plan(order.inputs, order.recipe, pieces, others)


def _manifest(
    work: Path, order: Order, plan: dict[str, Any], facts: list[PieceFacts], hashes: list[str],
    shards: dict[str, list[Shard]], older: Older | None,
) -> SourceManifest:  # fmt: skip
    documents = Documents(work, [sum(one.documents.values()) for one in facts])
    written = sum(shard.documents for split in SPLITS for shard in shards[split])
    if written + documents.num_duplicates != documents.starts[-1]:
        raise DataError(
            f"Source {order.name}: {documents.starts[-1]:,} documents were read and {documents.num_duplicates:,} are "
            f"duplicates, but its shards have {written:,}: a file in {work} is damaged.",
            f"Remove {work}, and run the same command again.",
        )
    quality, keys = _quality(facts, np.load(work / "counts.npy")), None
    generation = older.generation + 1 if older is not None else 0
    if order.recipe.deduplicate:
        keys = write_keys(documents, work / "new" / f"documents-{generation:05}.keys")
    manifest = manifest_of(
        order.inputs, order.recipe, order.licence or "unknown", plan["sha256"], facts, hashes, quality, shards,
        documents.kept(facts), keys,
    )  # fmt: skip
    assert manifest.text is not None
    write_lists(work / "new", generation, manifest.text["inputs"], lists_of(order.inputs, facts))
    return manifest if older is None else merged(older, manifest)


def _require_elsewhere(order: Order, folder: Path) -> None:
    """Raises: DataError for an input within the source's own folder, which is replaced."""
    paths = (Path(path).resolve() for path, *_ in order.inputs.files)
    within = next((path for path in paths if path.is_relative_to(folder.resolve())), None)
    if within is not None:
        raise DataError(f"{within} lies in {folder}, which is replaced.", "Move it away, or choose another --out.")


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
        sync_file(temporary)
        os.replace(temporary, kept)
    return kept.read_text()


def _write_shards(
    work: Path, order: Order, counts: Sequence[int], workers: Workers, advance: Advance, older: Older | None
) -> dict[str, list[Shard]]:
    documents = Documents(work, counts)
    sync_files(work)
    (work / "new").mkdir(exist_ok=True)
    shards: dict[str, list[Shard]] = {}
    for split in SPLITS:
        tasks = plan_shards(
            documents, split, itemsize=order.dtype.itemsize, shard_bytes=order.shard_bytes,
            number=len(older.manifest.shards(split)) if older is not None else 0,
        )  # fmt: skip
        if not tasks and (older is None or split == "train"):
            require_both_splits(
                order.name, {one: documents.count(one) for one in SPLITS}, "document",
                held_out_share=order.recipe.held_out,
            )  # fmt: skip
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
