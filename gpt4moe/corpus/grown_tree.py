"""A source tree that got new files: they alone are read, by the list of those that were.

tree-00000-0.sums   in the folder of a source: what sha256sum prints in its tree, sorted as it was read. The hash of
                    the list stands in the manifest (`sha256_of_sums` of the input)
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt4moe.config.checksums import file_sha256
from gpt4moe.corpus.inputs import Inputs
from gpt4moe.corpus.records import Notes, Part, read_part
from gpt4moe.errors import DataError


def without_known(inputs: Inputs, folder: Path, known: Sequence[dict[str, Any]]) -> Inputs:
    """The inputs without those files of trees that a source was made of.

    Args:
        folder: of the source.
        known: inputs of its manifest.
    Raises: DataError for a file that has another text now, and for a damaged list.
    """
    listed, given = [one for one in known if "sums" in one], [root for root, _ in inputs.roots]
    trees = [one["path"] for one in listed]
    before = {path: d for one in listed for path, d in _listed(folder, one, _places(one["path"], trees, given))}
    kept, roots, start = [], [], 0
    for root, count in inputs.roots:
        files = inputs.files[start : start + count]
        start += count
        new = [one for one in files if not _is_known(one[0], before, folder)]
        if len(new) < len(files):  # a file that is no text is in no list: it would come as new each time
            new = [one for one in new if _is_text(one)]
        kept += new
        roots += [(root, len(new))] if new else []
    # What is not read of a tree was counted when it was first read.
    return inputs if len(kept) == len(inputs.files) else replace(inputs, files=kept, roots=roots, skipped={})


def _places(tree: str, trees: Sequence[str], given: Sequence[str]) -> list[str]:
    """Where a tree may lie now. One that was moved, or is named from another folder, is a given one or lies in it."""
    within = [os.path.relpath(tree, one) for one in trees if f"{tree}{os.sep}".startswith(f"{one}{os.sep}")]
    return [tree, *(os.path.normpath(os.path.join(root, one)) for root in given for one in within)]


def _listed(folder: Path, one: dict[str, Any], places: Sequence[str]) -> list[tuple[str, str]]:
    """Real path and sha256 of each file of a tree, at the first place that has most of them."""
    path = folder / one["sums"]
    if not path.is_file() or file_sha256(path) != one["sha256_of_sums"]:
        raise DataError(
            f"{path} is damaged: it is not the list of {one['path']} that was written.",
            "Restore it, or make the source anew with --source.",
        )
    lines = path.read_bytes().decode().removesuffix("\n").split("\n")  # a name may have \r
    pairs = [(name, digest) for digest, _, name in (line.partition("  ") for line in lines)]
    counts = ((root, sum(os.path.isfile(f"{root}/{name}") for name, _ in pairs)) for root in places)
    root = next((root for root, count in counts if 2 * count > len(pairs)), one["path"])
    return [(os.path.join(os.path.realpath(root), name), digest) for name, digest in pairs]


def _is_known(path: str, before: dict[str, str], folder: Path) -> bool:
    digest = before.get(os.path.realpath(path))
    if digest is not None and file_sha256(Path(path)) != digest:
        raise DataError(
            f"{path} has another text than when {folder} was made of it, and that one stays in the source.",
            "Put it back, or make the whole source anew with --source; a new text may have a file of its own.",
        )
    return digest is not None


def _is_text(entry: tuple[str, str, int, int]) -> bool:
    """Whether a file of a tree is a document."""
    path, kind, size, _ = entry
    notes = Notes()
    for _ in read_part(Part(path, kind, 0, size), "", lambda amount: None, notes) if kind == "tree" else ():
        pass
    return kind != "tree" or bool(notes.files)


def write_lists(new: Path, generation: int, entries: list[dict[str, Any]], lists: dict[str, str]) -> None:
    """Writes the list of each tree, and names it in the tree's entry of the manifest.

    Args:
        generation: how often the source was extended before this.
        entries: inputs of the manifest.
        lists: path of a tree -> its lines.
    """
    trees = [one for one in entries if one["path"] in lists and lists[one["path"]].count("\n") == one["files"]]
    for number, one in enumerate(trees):  # without those that have a file with a line break in its name
        one["sums"] = f"tree-{generation:05}-{number}.sums"
        (new / one["sums"]).write_text(lists[one["path"]], encoding="utf-8")
