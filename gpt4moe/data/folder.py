"""Writes into a data folder: a source is moved in place when it is whole, the folder's manifest comes last."""

import argparse
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gpt4moe.data.manifest import MANIFEST_NAME, DataManifest, SourceManifest, file_sha256
from gpt4moe.data.tokenizer import Tokenizer
from gpt4moe.durable import sync_files, sync_folder
from gpt4moe.errors import ConfigError, DataError

TOKENIZER_NAME = "tokenizer.json"


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
    require_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        new = Path(beside) / "new"
        new.mkdir()
        yield new
        move_in_place(new, folder, Path(beside) / "old")


def move_in_place(new: Path, folder: Path, old: Path) -> None:
    """A source that is whole takes the place of an older one, which becomes `old`. All of it is on the disk then."""
    require_replaceable(folder)
    sync_files(new)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    sync_folder(folder.parent)


def require_replaceable(folder: Path) -> None:
    """Raises: DataError when what lies at a source's place is no source: it may be somebody's files."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        SourceManifest.read(folder)
    except DataError as error:
        raise DataError(
            f"{folder} is there and is no source: nothing is written in its place.",
            "Move it away, or choose another name or --out.",
        ) from error


def require_source_name(name: str) -> None:
    """Raises: DataError for a name that would not be a folder of its own within the data folder."""
    if not re.fullmatch(r"[^\W_][\w.-]{0,99}", name) or name in (MANIFEST_NAME, TOKENIZER_NAME):
        raise DataError(
            f"{name!r} cannot name a source: it names a folder within the data folder.",
            "Write a letter or digit, then at most 99 letters, digits, dots, - and _, for example web-2024.",
        )


def named(text: str) -> tuple[str, str]:
    """NAME=VALUE of a command line that makes sources, as an argument's type."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def require_named_once(option: str, names: Sequence[str]) -> None:
    """Raises: ConfigError when an option NAME=VALUE gives a source twice."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"{option} {twice}= is given twice.", f"Give it once; several files as {option} {twice}=ONE,TWO."
        )


def held_out(document: str | bytes, share: float) -> bool:
    """Whether a document is held out: by its hash, so that copies of it are all in the same split."""
    data = document.encode() if isinstance(document, str) else document
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") < share * 2.0**64


def finish_folder(folder: Path, manifest: DataManifest, tokenizer_path: Path) -> None:
    """Gives a new folder its tokenizer and, last, its manifest."""
    if (folder / MANIFEST_NAME).is_file():
        return
    if tokenizer_path.resolve() != (folder / TOKENIZER_NAME).resolve():
        shutil.copyfile(tokenizer_path, folder / TOKENIZER_NAME)
    manifest.write(folder)
