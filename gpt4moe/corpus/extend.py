"""A source that grows: new shards behind the old ones, which are checked and stay as they are.

    train-00000 ... train-00002 | train-00003 ...     moved in beside them, then manifest.json anew by a rename

Until that rename the source is the older one, and its files are those of the older one afterwards too.
"""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt4moe.corpus.duplicates import KEY_BYTES
from gpt4moe.corpus.inputs import Inputs
from gpt4moe.corpus.piece import Recipe
from gpt4moe.corpus.unfinished import are_whole
from gpt4moe.data.manifest import SPLITS, SourceManifest, file_sha256
from gpt4moe.durable import sync_files, sync_folder
from gpt4moe.errors import DataError

_ANEW = "Give these files to a source of their own, or make the whole source anew with --source and all of its files."
_KEYS_AT_ONCE = 1 << 20
_FREE = {"library", "evaluation"}
"""Keys of a recipe that change no token: both libraries give the same ids, and files of an evaluation have a hash."""


@dataclass(frozen=True, slots=True)
class Older:
    """A source that will be extended."""

    folder: Path
    manifest: SourceManifest

    @property
    def text(self) -> dict[str, Any]:
        return dict(self.manifest.text or {})

    @property
    def generation(self) -> int:
        """How often it was extended."""
        return len(self.text.get("extensions", ()))

    def keys(self) -> Iterator[bytes]:
        """Keys of its documents (duplicates.py)."""
        for one in self.text["keys"]:
            with (self.folder / one["file"]).open("rb") as stream:
                while data := stream.read(_KEYS_AT_ONCE * KEY_BYTES):
                    yield data

    @property
    def num_keys(self) -> int:
        return sum(one["documents"] for one in self.text.get("keys", ()))


def extended_from(folder: Path) -> str | None:
    """The plan of the source before its last extension; None where it has none."""
    text = SourceManifest.read(folder).text if folder.exists() else None
    found: str | None = (text or {}).get("extends")
    return found


def open_older(folder: Path, inputs: Inputs, recipe: Recipe, licence: str | None) -> Older:
    """
    Raises: DataError where there is no source of this command, where it was made otherwise or from one of these files.
    """
    if not folder.exists():
        raise DataError(f"There is no source {folder} to extend.", "Make it with --source.")
    older = Older(folder, SourceManifest.read(folder))
    if older.manifest.text is None:
        raise DataError(f"{folder} was not made by this command.", "Give these files to a source of their own.")
    _require_same(older, recipe, licence)
    known = {os.path.realpath(one["path"]) for one in older.text["inputs"]}
    again = next((path for path, _ in inputs.roots if os.path.realpath(path) in known), None)
    if again is not None:
        raise DataError(
            f"{folder} was made of {again} already: its documents would be there twice.",
            "Name new files alone. New documents go into files of their own.",
        )
    return older


def require_older_files(older: Older) -> None:
    """Raises: DataError for a file of the older source that is not the one that was written."""
    keys = older.text.get("keys", ())
    if not are_whole(older.folder, older.manifest) or any(
        not (older.folder / one["file"]).is_file() or file_sha256(older.folder / one["file"]) != one["sha256"]
        for one in keys
    ):
        raise DataError(
            f"{older.folder} is damaged: a file is not the one that was written.",
            "Restore it (tools/mixture.py verify names it), or make the source anew with --source.",
        )


def _require_same(older: Older, recipe: Recipe, licence: str | None) -> None:
    said = json.loads(json.dumps(dataclasses.asdict(recipe)))
    before = {**older.text["recipe"], "tokenizer_sha256": older.manifest.tokenizer_sha256}
    for key in sorted(before.keys() - _FREE):
        if said.get(key) != before[key]:
            raise DataError(
                f"{older.folder} was made with {key}={before[key]}, this command says {said.get(key)}.",
                f"Give the same options. {_ANEW}",
            )
    if licence not in (None, older.manifest.licence):
        raise DataError(f"{older.folder} has the licence {older.manifest.licence}, not {licence}.", _ANEW)
    if recipe.deduplicate and "keys" not in older.text:
        raise DataError(f"{older.folder} has no keys to find duplicates of its documents by.", _ANEW)


def merged(older: Older, added: SourceManifest) -> SourceManifest:
    """The manifest of both. Raises: DataError for an input that the older one has under another name."""
    before, new = older.text, dict(added.text or {})
    digests = {_digest(one): one["path"] for one in before["inputs"]}
    for one in new["inputs"]:
        if _digest(one) in digests:
            raise DataError(
                f"{one['path']} is {digests[_digest(one)]}, which {older.folder} was made of already.",
                "Name new files alone.",
            )
    tokens = [max(1, sum(text["tokens"].values())) for text in (before, new)]
    text: dict[str, Any] = {**before, "plan_sha256": new["plan_sha256"], "extends": before["plan_sha256"]}
    for key in ("documents", "tokens", "bytes", "bytes_read", "removed", "files_skipped"):
        text[key] = dict(sorted((Counter(before[key]) + Counter(new[key])).items()))
    for key in ("documents", "tokens", "bytes", "bytes_read"):
        text[key] = {split: text[key].get(split, 0) for split in SPLITS}
    for key in ("unknown_share", "unigram_entropy_bits"):
        text[key] = (before[key] * tokens[0] + new[key] * tokens[1]) / sum(tokens)
    text["middle_last"] = before["middle_last"] + new["middle_last"]
    text["inputs"] = [*before["inputs"], *new["inputs"]]
    text["libraries"] = sorted({*before["libraries"], *new["libraries"]})
    if "keys" in new:
        text["keys"] = [*before["keys"], *new["keys"]]
    text["extensions"] = [
        *before.get("extensions", ()),
        {key: new[key] for key in ("documents", "tokens", "unknown_share", "unigram_entropy_bits", "plan_sha256")},
    ]
    return dataclasses.replace(
        older.manifest, train=[*older.manifest.train, *added.train], valid=[*older.manifest.valid, *added.valid],
        description=f"{older.manifest.description}, {added.description}", text=text,
    )  # fmt: skip


def _digest(one: dict[str, Any]) -> str:
    return str(one.get("sha256") or one["sha256_of_sums"])


def move_beside(new: Path, folder: Path, manifest: SourceManifest) -> None:
    """The new files join the older ones, whose manifest is replaced last. After a kill it may be called again."""
    sync_files(new)
    for path in sorted(new.iterdir()):
        os.replace(path, folder / path.name)
    sync_folder(folder)
    manifest.write(folder)
