"""What a source's manifest says of its text, and the last step: the source is moved in place."""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt4moe.corpus.extend import Older, move_beside
from gpt4moe.corpus.inputs import Inputs
from gpt4moe.corpus.piece import PieceFacts, Recipe
from gpt4moe.corpus.quality import STRIDE, Quality
from gpt4moe.corpus.unfinished import clear
from gpt4moe.data.in_place import move_in_place
from gpt4moe.data.manifest import SPLITS, Shard, SourceManifest


def manifest_of(
    inputs: Inputs, recipe: Recipe, licence: str, plan_sha256: str, facts: Sequence[PieceFacts],
    hashes: Sequence[str], quality: Quality, shards: dict[str, list[Shard]], kept_text: tuple[dict[str, int], int],
    keys: dict[str, Any] | None,
) -> SourceManifest:  # fmt: skip
    """
    Args:
        hashes: of the inputs that are not hashed as documents.
        kept_text: Documents.kept.
        keys: entry of the file that assemble.write_keys wrote.
    """
    removed, skipped = Counter[str](), Counter[str](inputs.skipped)
    for one in facts:
        removed.update(one.removed)
        skipped.update(one.skipped)
    read = {split: sum(one.documents[split] for one in facts) for split in SPLITS}
    kept = {split: sum(shard.documents for shard in shards[split]) for split in SPLITS}
    removed["duplicates"] = sum(read.values()) - sum(kept.values())
    said = {key: value for key, value in dataclasses.asdict(recipe).items() if not key.startswith("tokenizer")}
    text = {
        "documents": kept, "tokens": {split: sum(shard.tokens for shard in shards[split]) for split in SPLITS},
        "bytes": kept_text[0], "bytes_read": {split: sum(one.bytes[split] for one in facts) for split in SPLITS},
        "removed": {key: count for key, count in sorted(removed.items()) if count},
        "files_skipped": {key: count for key, count in sorted(skipped.items()) if count},
        "middle_last": kept_text[1],
        "unknown_share": quality.unknown_share, "unigram_entropy_bits": round(quality.entropy_bits, 4),
        "entropy_of_every": STRIDE, "inputs": _inputs(inputs, facts, hashes),
        "recipe": said,
        "libraries": sorted({one.library for one in facts}), "plan_sha256": plan_sha256,
    }  # fmt: skip
    if keys is not None:
        text["keys"] = [keys]
    return SourceManifest(
        tokenizer_sha256=recipe.tokenizer_sha256, licence=licence,
        description=", ".join(Path(path).name for path, _ in inputs.roots),
        train=shards["train"], valid=shards["valid"], text=text,
    )  # fmt: skip


def _inputs(inputs: Inputs, facts: Sequence[PieceFacts], hashes: Sequence[str]) -> list[dict[str, Any]]:
    """Path, bytes and sha256 of each input; of a tree, of the lines that sha256sum would print for its text files."""
    single, of_document = iter(hashes), dict(pair for one in facts for pair in one.files)
    lists = lists_of(inputs, facts)
    found, start = [], 0
    for root, count in inputs.roots:
        files = inputs.files[start : start + count]
        start += count
        if root in lists:
            found.append({
                "path": root, "files": sum(path in of_document for path, *_ in files),
                "bytes": sum(size for _, _, size, _ in files),
                "sha256_of_sums": hashlib.sha256(lists[root].encode()).hexdigest(),
            })  # fmt: skip
            continue
        found += [
            {"path": path, "bytes": size, "sha256": of_document[path] if kind == "text" else next(single)}
            for path, kind, size, _ in files
        ]
    return found


def lists_of(inputs: Inputs, facts: Sequence[PieceFacts]) -> dict[str, str]:
    """Path of each tree -> the lines that sha256sum would print for its text files."""
    of_document = dict(pair for one in facts for pair in one.files)
    found, start = {}, 0
    for root, count in inputs.roots:
        files = inputs.files[start : start + count]
        start += count
        if all(kind == "tree" for _, kind, *_ in files):
            names = [path for path, *_ in files if path in of_document]
            found[root] = "".join(f"{of_document[path]}  {os.path.relpath(path, root)}\n" for path in names)
    return found


def _contaminated(facts: Sequence[PieceFacts]) -> list[dict[str, Any]]:
    """Place, evaluation file and words of each document that was removed for them."""
    rows: list[dict[str, Any]] = []
    lines: Counter[str] = Counter()
    for one in facts:
        before = []
        for path, count in one.lines:
            before.append((path, lines[path]))
            lines[path] += count
        for row in one.contaminated:
            if "part" not in row:
                rows.append(row)
                continue
            path, count = before[row["part"]]
            others = {key: value for key, value in row.items() if key not in ("part", "line")}
            rows.append({"document": f"{path}:{count + row['line']}", **others})
    return rows


def commit(
    work: Path, folder: Path, facts: Sequence[PieceFacts], manifest: SourceManifest, older: Older | None
) -> None:
    """Gives a source its manifest and its place, or its files to an older one. Nothing stays of the work."""
    contaminated = _contaminated(facts)
    if contaminated:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in contaminated)
        name = f"contaminated-{older.generation + 1:05}.jsonl" if older is not None else "contaminated.jsonl"
        (work / "new" / name).write_text(lines, encoding="utf-8")
    if older is not None:
        move_beside(work / "new", folder, manifest)
        clear(work)
        return
    manifest.write(work / "new")
    (work / "plan.json").unlink(
        missing_ok=True
    )  # else a kill amid the removal below would leave a plan without its work
    move_in_place(work / "new", folder, work / "old")
    clear(work)
