"""Manifests of a data folder: one of its vocabulary, one of each source. A source is whole once its manifest is there.

FOLDER/manifest.json                  vocabulary, tokenizer
FOLDER/tokenizer.json
FOLDER/<source>/manifest.json         licence, the shards of its two splits; written last
FOLDER/<source>/train-00000.{bin,idx,sums} ...
FOLDER/<source>/train-00000.frames, train-images-00000.{img,table}      of a source with images (image_files.py)

A manifest begins with the sha256 of its own text; those of before there was one are read too.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt4moe.config.own_files import plain_name
from gpt4moe.config.typed import FieldError, from_plain, sealed, unsealed
from gpt4moe.data.blocks import INDEX_BLOCK_BYTES, num_blocks
from gpt4moe.durable import sync_folder
from gpt4moe.errors import DataError

MAKE_DATA = (
    "Run `make data` (it makes data/demo), or make your own: tools/tokenize_corpus.py of text, "
    "tools/prepare_chat.py of conversations, tools/prepare_media.py of images; or choose data=mock."
)
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "valid")
TOKEN_TYPES = ("uint8", "int8", "int16", "int32", "int64", "uint16")
"""Of a token in .bin: those of Megatron's whole numbers (indexed.DTYPES)."""
_FORMAT = 2
_SEAL = '{"sha256": "'
"""Begin of a manifest that is sealed (config.typed.sealed)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One pair of .bin/.idx files."""

    file: str
    """Path without suffix, from the source's folder. Files of Megatron-LM that were registered lie elsewhere."""
    sums: str
    """File of its blocks' checksums, in the source's folder."""
    documents: int
    tokens: int
    dtype: str
    """Of a token in .bin: a type of numpy."""
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str
    idx_blocks: int = 0
    """Of the .idx, whose checksums `sums` has behind those of the .bin; 0: none, an older tool wrote the source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageShard:
    """One pair of .img/.table files: encoded images one after the other, and where each lies."""

    file: str
    """Name without suffix, in the source's folder."""
    images: int
    bytes: int
    """Of the .img."""
    table_sha256: str
    """Of the .table, which has the sha256 of each image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameTable:
    """The .frames file of a shard of tokens: which images stand at its image tokens."""

    file: str
    images: int
    """Image tokens; a clip is one."""
    frames: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFiles:
    """What a source with images has beside its tokens."""

    token: str
    """That stands for an image in the text."""
    image_id: int
    shards: dict[str, Sequence[ImageShard]]
    """Split -> its images."""
    frames: dict[str, Sequence[FrameTable]]
    """Split -> a table for each shard of its tokens."""
    counts: Mapping[str, Any]
    """What was made and what was left out (gpt4moe/media/source.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceManifest:
    """Of one source."""

    tokenizer_sha256: str
    licence: str
    description: str
    train: Sequence[Shard]
    valid: Sequence[Shard]
    masks: dict[str, Sequence[Shard]] = field(default_factory=dict)
    """Of conversations: split -> a shard for each one of its tokens, a byte a token; 1: it is trained. Else empty."""
    text: Mapping[str, Any] | None = None
    """What is known of the text (gpt4moe/corpus/result.py): documents, inputs and their hashes, what was removed."""
    images: ImageFiles | None = None
    """Of documents with images; None: it is text alone."""

    @classmethod
    def read(cls, folder: Path) -> "SourceManifest":
        """Raises: DataError when the folder has none, or one of another format."""
        raw = _read(folder, "The source")
        try:
            manifest = from_plain(cls, raw)
            manifest._require_sense()
        except ValueError as error:
            raise _foreign(folder, error) from error
        return manifest

    def _require_sense(self) -> None:
        """Raises: FieldError for values that have their types and cannot be."""
        groups: list[Mapping[str, Sequence[Any]]] = [{"train": self.train, "valid": self.valid}, self.masks]
        if self.images is not None:
            groups += [self.images.shards, self.images.frames]
        if any(set(group) != set(SPLITS) for group in groups if group is not self.masks or group):
            raise FieldError(f"a split is none of {', '.join(SPLITS)}, or missing")
        for shard in (one for group in groups for shards in group.values() for one in shards):
            if isinstance(shard, Shard):
                # Its .bin may lie elsewhere (tools/mixture.py register); what is read there are numbers.
                plain_name(shard.sums)
                if shard.dtype not in TOKEN_TYPES:
                    raise FieldError(f"a shard's dtype is {shard.dtype}, not one of {', '.join(TOKEN_TYPES)}")
                if shard.idx_blocks not in (0, num_blocks(shard.idx_bytes, INDEX_BLOCK_BYTES)):
                    raise FieldError(f"a shard's idx_blocks is {shard.idx_blocks}, of {shard.idx_bytes} bytes")
            else:
                plain_name(shard.file)

    def write(self, folder: Path) -> None:
        _write(folder, self)

    @property
    def is_chat(self) -> bool:
        """Whether its documents are conversations, with a mask of trained tokens."""
        return bool(self.masks)

    @property
    def made_by(self) -> str:
        """The command that makes such a source."""
        if self.is_chat:
            return "tools/prepare_chat.py"
        if self.images is not None:
            return "tools/prepare_media.py"
        return "tools/tokenize_corpus.py" if self.text else "`make data` or tools/mixture.py register"

    def shards(self, split: str) -> Sequence[Shard]:
        return self.train if split == "train" else self.valid

    def num_tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.shards(split))

    def num_documents(self, split: str) -> int:
        return sum(shard.documents for shard in self.shards(split))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataManifest:
    """Of a data folder: what all of its sources have in common."""

    vocab_size: int
    eos_id: int
    tokenizer: str
    """File name within the folder."""
    tokenizer_sha256: str

    @classmethod
    def read(cls, folder: Path) -> "DataManifest":
        """Raises: DataError when the folder has none, or one of another format."""
        raw = _read(folder, f"data.path={folder}")
        try:
            manifest = from_plain(cls, raw)
            plain_name(manifest.tokenizer)
        except ValueError as error:
            raise _foreign(folder, error) from error
        return manifest

    def write(self, folder: Path) -> None:
        _write(folder, self)


def _read(folder: Path, what: str) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        problem = f"has no {MANIFEST_NAME}" if folder.is_dir() else "does not exist"
        raise DataError(f"{what} {problem}.", MAKE_DATA)
    try:
        text = path.read_bytes().decode()
        body = unsealed(text) if text.startswith(_SEAL) else text
        raw = None if body is None else json.loads(body)
        if body is None or (isinstance(raw, dict) and "sha256" in raw):  # or another program wrote it anew, key by key
            raise DataError(
                f"{path} was changed since it was written: its sha256 is that of another text.",
                "Restore it from its original, or make it again. If the change is yours, take the sha256 out of it.",
            )
        if not isinstance(raw, dict) or raw.pop("format", None) != _FORMAT:
            raise ValueError("another format")
    except (OSError, ValueError, RecursionError) as error:
        raise _foreign(folder, error) from error
    return raw


def _foreign(folder: Path, error: Exception) -> DataError:
    return DataError(
        f"{folder / MANIFEST_NAME} is no data manifest of format {_FORMAT} ({type(error).__name__}: {error}).",
        "Name a folder that was made by a tool of this version, or make it again in another place.",
    )


def _write(folder: Path, manifest: DataManifest | SourceManifest) -> None:
    content = {"format": _FORMAT, **dataclasses.asdict(manifest)}
    for key in ("masks", "text", "images"):  # a source that has none has a manifest without the key
        if not content.get(key):
            content.pop(key, None)
    _replace_text(folder / MANIFEST_NAME, sealed(_as_json(content)))


def write_json(path: Path, content: Any) -> None:
    """Writes a temporary file and renames it, so that no reader sees half of it, also after a power failure."""
    _replace_text(path, _as_json(content))


def _as_json(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)
