"""Writes into a data folder: a source is moved in place when it is whole, the folder's manifest comes last."""

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt4moe.config.checksums import file_sha256
from gpt4moe.data.in_place import finish_move, move_in_place, require_replaceable
from gpt4moe.data.manifest import MANIFEST_NAME, DataManifest, SourceManifest
from gpt4moe.data.tokenizer import Tokenizer
from gpt4moe.durable import sync_file
from gpt4moe.errors import DataError

TOKENIZER_NAME = "tokenizer.json"
LISTED = 10_000
"""Lines of a list of what was left out."""


def vocabulary_of(
    folder: Path, tokenizer: Tokenizer, tokenizer_path: Path, vocab_size: int | None = None, *,
    replaced: Sequence[str] = (),
) -> DataManifest:  # fmt: skip
    """The manifest that the folder has, or that a new one will have.

    Args:
        vocab_size: of the model, where it is larger than the tokenizer's; None: as the folder has it, or the tokenizer.
        replaced: sources that will be made anew.
    Raises: DataError for another tokenizer or vocabulary than the folder's, for one smaller than the tokenizer's, and
        for another tokenizer than that of a source in a folder without a manifest, which a command that was ended left.
    """
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise DataError(
            f"--vocab-size {vocab_size}, and the tokenizer has {tokenizer.vocab_size:,} tokens.",
            "Give the model's, or leave it out.",
        )
    digest = file_sha256(tokenizer_path)
    if not (folder / MANIFEST_NAME).is_file():
        size = tokenizer.vocab_size if vocab_size is None else vocab_size
        for path in sorted(folder.glob(f"[!.]*/{MANIFEST_NAME}")):
            name = path.parent.name
            if name not in replaced and SourceManifest.read(path.parent).tokenizer_sha256 != digest:
                raise DataError(
                    f"{path.parent}, of a folder that is not finished, was made by another tokenizer than "
                    f"{tokenizer_path}.",
                    "Use its tokenizer, remove it, or write to another folder.",
                )
        return DataManifest(
            vocab_size=size, eos_id=tokenizer.eos_id, tokenizer=TOKENIZER_NAME, tokenizer_sha256=digest
        )  # fmt: skip
    manifest = DataManifest.read(folder)
    if manifest.tokenizer_sha256 != digest:
        raise DataError(
            f"The sources of {folder} were made by another tokenizer than {tokenizer_path}.",
            f"Use {folder / manifest.tokenizer}, or write to another folder.",
        )
    if vocab_size is not None and manifest.vocab_size != vocab_size:
        raise DataError(
            f"{folder} has a vocabulary of {manifest.vocab_size:,}, not {vocab_size:,}.", "Write to another folder."
        )
    return manifest


@contextmanager
def new_source(folder: Path) -> Iterator[Path]:
    """An empty folder to write a source into; without an error it takes the place of an older one at the end. Do not
    replace a source that a run reads: it opens shards when it comes to them."""
    require_source_name(folder.name)
    finish_move(folder)
    require_replaceable(folder)
    # Of the modes that every other folder gets, not tempfile's 0700: what a kill leaves may be another's to remove.
    beside = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    with folder_to_fill(folder.parent):
        beside.mkdir()
        try:
            (beside / "new").mkdir()
            yield beside / "new"
            move_in_place(beside / "new", folder, beside / "old")
        finally:
            shutil.rmtree(beside)


@contextmanager
def folder_to_fill(folder: Path) -> Iterator[None]:
    """Makes a folder and those above it. What is made and stays empty, because of an error, goes again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):  # it has something, a list of bad images for example
                path.rmdir()
        raise


def require_source_name(name: str) -> None:
    """Raises: DataError for a name that would not be a folder of its own within the data folder."""
    if not re.fullmatch(r"[^\W_][\w.-]{0,99}", name) or name in (MANIFEST_NAME, TOKENIZER_NAME):
        raise DataError(
            f"{name!r} cannot name a source: it names a folder within the data folder.",
            "Write a letter or digit, then at most 99 letters, digits, dots, - and _, for example web-2024.",
        )


def held_out(document: str | bytes, share: float) -> bool:
    """Whether a document is held out: by its hash, so that copies of it are all in the same split."""
    data = document.encode() if isinstance(document, str) else document
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") < share * 2.0**64


@dataclass(slots=True)
class LeftOut:
    """What a new source leaves out: all of it is counted, the first LISTED are listed with their reasons."""

    count: int = 0
    listed: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **facts: Any) -> None:
        self.count += 1
        if self.count <= LISTED:
            self.listed.append(facts)

    def write(self, path: Path) -> None:
        """A JSON object a line; the last says how many are not listed, if any."""
        more = [{"not_listed": self.count - LISTED}] if self.count > LISTED else []
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in (*self.listed, *more)]
        path.write_text("".join(lines), encoding="utf-8")


def require_both_splits(
    name: str, counts: Mapping[str, int], what: str, *, held_out_share: float | None, left_out: LeftOut | None = None,
    other_cure: str = "",
) -> None:  # fmt: skip
    """
    Args:
        counts: split -> its documents.
        what: a source's documents are called.
        held_out_share: None where files are named for each split.
        other_cure: than another share.
    Raises: DataError for a split without a document: why it has none.
    """
    empty = next((split for split, count in counts.items() if not count), None)
    if empty is None:
        return
    total, there = sum(counts.values()), ", ".join(f"{count:,} for {split}" for split, count in counts.items())
    cause = f"Source {name} has no {what} for {empty} ({there}"
    if left_out is not None and left_out.count:
        cause += f", {left_out.count:,} left out: {left_out.listed[0]['reason'].rstrip('.')}"
    if held_out_share is None or not total:
        raise DataError(f"{cause}).", f"Mend what was left out, or name files that have a {what} for {empty}.")
    share = min(0.5, max(5 / total, held_out_share)) if empty == "valid" else held_out_share / 2
    raise DataError(
        f"{cause}): --held-out {held_out_share:g} of {total:,} chose {'none' if empty == 'valid' else 'all'}.",
        f"They are chosen by a hash: set --held-out {share:.2g}{other_cure}.",
    )


def finish_folder(folder: Path, manifest: DataManifest, tokenizer_path: Path) -> None:
    """Gives a new folder its tokenizer and, last, its manifest."""
    if (folder / MANIFEST_NAME).is_file():
        return
    if tokenizer_path.resolve() != (folder / TOKENIZER_NAME).resolve():
        shutil.copyfile(tokenizer_path, folder / TOKENIZER_NAME)
    sync_file(folder / TOKENIZER_NAME)
    manifest.write(folder)
