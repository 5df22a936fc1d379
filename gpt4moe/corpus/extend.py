"""A source that grows: new shards behind the old ones, which are checked and stay as they are.

    train-00000 ... train-00002 | train-00003 ...     moved in beside them, then manifest.json anew by a rename

Until that rename the source is the older one, and its files are those of the older one afterwards too.
"""

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt4moe.config.checksums import file_sha256
from gpt4moe.corpus.duplicates import KEY_BYTES
from gpt4moe.corpus.inputs import Inputs
from gpt4moe.corpus.piece import Recipe
from gpt4moe.corpus.unfinished import are_whole
from gpt4moe.data.manifest import MANIFEST_NAME, SPLITS, SourceManifest
from gpt4moe.durable import sync_files, sync_folder
from gpt4moe.errors import DataError

_ANEW = "Give these files to a source of their own, or make the whole source anew with --source and all of its files."
_KEYS_AT_ONCE = 1 << 20
_NEEDED = (
    "documents", "tokens", "bytes", "bytes_read", "removed", "files_skipped", "middle_last", "unknown_share",
    "unigram_entropy_bits", "inputs", "recipe", "libraries", "plan_sha256",
)  # fmt: skip
"""What merged and open_older read of an older manifest."""
_NOT_OF_TREES = (".jsonl", ".gz", ".zst", ".parquet")
"""A folder that is read as a tree leaves these out, so they may be added later."""
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


def extended_from(folder: Path) -> list[str]:
    """Plans of the source before each of its extensions."""
    text = _text(folder)
    extensions = text.get("extensions", [])
    found = [text.get("extends"), *(one.get("extends") for one in extensions)]
    # Manifests of before `extends` was said of each: an extension's base is the one before it.
    found += [one["plan_sha256"] for one in extensions[:-1]]
    return list(dict.fromkeys(base for base in found if base is not None))


def require_extensions_kept(folder: Path, inputs: Inputs) -> None:
    """Raises: DataError where a source was extended, and one made anew of these inputs would lack some of its files."""
    text = _text(folder)
    if not text.get("extensions"):
        return
    named = {known for _, known in _given_again(inputs, text["inputs"])}
    dropped = list(dict.fromkeys(one["path"] for one in text["inputs"] if one["path"] not in named))
    if dropped:
        more = f" and {len(dropped) - 10} more" if len(dropped) > 10 else ""
        raise DataError(
            f"{folder} was extended: its documents of {', '.join(dropped[:10])}{more} would be dropped.",
            f"Name these files too. Add new files with --extend. To make it without these, remove {folder} first.",
        )


def inputs_of(folder: Path) -> list[dict[str, Any]]:
    """What a source was made of; empty where there is none."""
    return list(_text(folder).get("inputs", ()))


def _text(folder: Path) -> dict[str, Any]:
    """A manifest's text; empty where there is no source, or not one of this command."""
    return dict((SourceManifest.read(folder).text if (folder / MANIFEST_NAME).is_file() else None) or {})


def _given_again(inputs: Inputs, known: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Files that are one of the known inputs of a manifest or lie in its tree, each with the path of that input."""
    files = {os.path.realpath(one["path"]): one["path"] for one in known if "sha256_of_sums" not in one}
    trees = {os.path.realpath(one["path"]): one["path"] for one in known if "sha256_of_sums" in one}
    found = []
    for path, *_ in inputs.files:
        real = os.path.realpath(path)
        if real in files:
            found.append((path, files[real]))
        elif not real.lower().endswith(_NOT_OF_TREES):
            found += [(path, tree) for root, tree in trees.items() if real.startswith(f"{root}{os.sep}")]
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
    missing = [key for key in _NEEDED if key not in older.text]
    if missing:
        raise DataError(f"{folder} is of an older version: its manifest lacks {', '.join(missing)}.", _ANEW)
    _require_same(older, recipe, licence)
    # Trees with a list were looked through by grown_tree.
    again = _given_again(inputs, [one for one in older.text["inputs"] if "sums" not in one])
    if again:
        path, known = again[0]
        where = f", in which {path} lies," if os.path.isdir(known) else ""
        raise DataError(
            f"{folder} was made of {known}{where} already: its documents would be there twice.",
            "Name new files alone. New documents go into files of their own, outside of a tree that was read.",
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
        {key: new[key] for key in ("documents", "tokens", "unknown_share", "unigram_entropy_bits", "plan_sha256")}
        | {"extends": before["plan_sha256"]},
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
    _remove_orphans(folder, manifest)
    for path in sorted(new.iterdir()):
        os.replace(path, folder / path.name)
    sync_folder(folder)
    manifest.write(folder)


def _remove_orphans(folder: Path, manifest: SourceManifest) -> None:
    """Removes files of an extension that was killed amid its move, and whose place another one takes."""
    text = dict(manifest.text or {})
    named = {f"{one.file}.{kind}" for one in (*manifest.train, *manifest.valid) for kind in ("bin", "idx", "sums")}
    named |= {one["file"] for one in text.get("keys", ())}
    named |= {one["sums"] for one in text["inputs"] if "sums" in one}
    named |= {f"contaminated-{number:05}.jsonl" for number in range(1, len(text["extensions"]))}
    for path in folder.iterdir():
        if _MOVED.fullmatch(path.name) and path.name not in named:
            path.unlink()


_MOVED = re.compile(
    r"(train|valid)-\d{5}\.(bin|idx|sums)|documents-\d{5}\.keys|tree-\d{5}-\d+\.sums|contaminated-\d{5}\.jsonl"
)
"""Files of an extension; contaminated-* is of the number of the extension, and the new one moves its own."""
