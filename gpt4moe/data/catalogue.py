"""Catalogue: the sources of one or several data folders that have one tokenizer."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from gpt4moe.config.checksums import file_sha256
from gpt4moe.data.image_files import FrameStream, ImageStore
from gpt4moe.data.in_place import unfinished_moves
from gpt4moe.data.manifest import MAKE_DATA, MANIFEST_NAME, SPLITS, DataManifest, SourceManifest
from gpt4moe.data.mixture import Phase, names_of
from gpt4moe.data.shards import ShardedTokens
from gpt4moe.errors import DataError

TOKENIZER_CURE = "Restore it from its original, or make the data folder again."


@dataclass(frozen=True, slots=True)
class Source:
    """One source, and where it lies."""

    name: str
    folder: Path
    manifest: SourceManifest
    _tokens: dict[str, ShardedTokens] = field(init=False, default_factory=dict, repr=False, compare=False)

    def tokens(self, split: str) -> ShardedTokens:
        """The same object each time: its files are looked at once. Raises: DataError for a file that is missing or has
        another size."""
        if split not in self._tokens:
            self._tokens[split] = ShardedTokens(self.folder, self.manifest.shards(split), self.manifest.made_by)
        return self._tokens[split]

    def mask(self, split: str) -> ShardedTokens:
        """Of each token 1 where it is trained, for conversations. Raises: DataError as tokens."""
        return ShardedTokens(self.folder, self.manifest.masks[split], self.manifest.made_by)

    def images(self, split: str) -> ImageStore:
        """Of a source with images. Raises: DataError as tokens."""
        assert self.manifest.images is not None
        return ImageStore(self.folder, self.manifest.images.shards[split])

    def frames(self, split: str) -> FrameStream:
        """Which images stand at which tokens, of a source with images. Raises: DataError as tokens."""
        assert self.manifest.images is not None
        ends = list(accumulate(shard.tokens for shard in self.manifest.shards(split)))
        return FrameStream(self.folder, self.manifest.images.frames[split], ends)


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Sources by name, of all folders."""

    folders: Sequence[Path]
    vocabulary: DataManifest
    sources: dict[str, Source]

    @classmethod
    def open(cls, folders: Sequence[Path]) -> "Catalogue":
        """Reads the manifests alone.

        Raises: DataError for a damaged manifest, folders of several tokenizers, and a name in two folders.
        """
        vocabulary, *others = (DataManifest.read(folder) for folder in folders)
        for folder, other in zip(folders[1:], others, strict=True):
            _require_tokenizer(folder, other.tokenizer_sha256, folders[0], vocabulary)
        sources: dict[str, Source] = {}
        for folder in folders:
            _require_manifests(folder)
            for path in sorted(folder.glob(f"[!.]*/{MANIFEST_NAME}")):
                source = Source(path.parent.name, path.parent, SourceManifest.read(path.parent))
                _require_tokenizer(source.folder, source.manifest.tokenizer_sha256, folders[0], vocabulary)
                if source.name in sources:
                    raise DataError(
                        f"Source {source.name} is in {sources[source.name].folder.parent} and in {folder}.",
                        "Rename the folder of one of them.",
                    )
                sources[source.name] = source
        if not sources:
            raise DataError(f"{', '.join(map(str, folders))}: there is no source.", MAKE_DATA)
        return cls(folders, vocabulary, sources)

    @property
    def tokenizer(self) -> Path:
        """tokenizer.json of the first folder."""
        return self.folders[0] / self.vocabulary.tokenizer

    def require_whole(self) -> None:
        """Raises: DataError when a file of any source is missing or of another size, or the tokenizer another one."""
        require_tokenizer_file(self.tokenizer)
        if file_sha256(self.tokenizer) != self.vocabulary.tokenizer_sha256:
            raise DataError(f"{self.tokenizer} is not the tokenizer of the manifest.", TOKENIZER_CURE)
        for source in self.sources.values():
            for split in SPLITS:
                source.tokens(split)
                if source.manifest.is_chat:
                    source.mask(split)
                if source.manifest.images is not None:
                    source.images(split)
                    source.frames(split)

    def train_tokens(self) -> dict[str, float]:
        """Training tokens of each source."""
        return {name: source.manifest.num_tokens("train") for name, source in self.sources.items()}

    def content_hash(self, phases: Sequence[Phase]) -> str:
        """sha256 of the tokens that are read and of the shares, wherever the folders lie."""
        return self._hash(names_of(phases), [[phase.first_sample, phase.shares] for phase in phases])

    def fingerprint(self) -> str:
        """sha256 of the tokens of all sources."""
        return self._hash(list(self.sources), [])

    def _hash(self, names: Sequence[str], phases: Sequence[Any]) -> str:
        content: dict[str, Any] = {
            "vocab_size": self.vocabulary.vocab_size,
            "eos_id": self.vocabulary.eos_id,
            "sources": {
                name: [[shard.bin_sha256 for shard in self.sources[name].manifest.shards(split)] for split in SPLITS]
                for name in names
            },
            "phases": phases,
        }
        masks = {
            name: [[shard.bin_sha256 for shard in self.sources[name].manifest.masks[split]] for split in SPLITS]
            for name in names
            if self.sources[name].manifest.is_chat
        }
        images = {
            name: [[found.image_id, [one.table_sha256 for one in found.shards[split]],
                    [one.sha256 for one in found.frames[split]]] for split in SPLITS]
            for name, found in ((name, self.sources[name].manifest.images) for name in names)
            if found is not None
        }  # fmt: skip
        # Without masks and images, data of text alone keeps the hash that it had.
        content |= {key: found for key, found in (("masks", masks), ("images", images)) if found}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tokenizer_problems(folder: Path) -> list[str]:
    """What is wrong with the tokenizer of a data folder. Raises: DataError for a damaged manifest."""
    manifest = DataManifest.read(folder)
    path = folder / manifest.tokenizer
    if not path.is_file():
        return [f"{path} is missing."]
    return [] if file_sha256(path) == manifest.tokenizer_sha256 else [f"{path} is not the tokenizer of the manifest."]


def require_tokenizer_file(tokenizer: Path) -> None:
    """Raises: DataError when it is missing."""
    if not tokenizer.is_file():
        raise DataError(f"The tokenizer {tokenizer} is missing.", TOKENIZER_CURE)


def _require_manifests(folder: Path) -> None:
    """Raises: DataError for shards of a source without its manifest, which is written and copied last, and for a source
    that a kill kept from its place: a run would read the other sources and say nothing."""
    for name, beside in unfinished_moves(folder).items():
        raise DataError(
            f"Source {name} of {folder} is not in its place: a command was ended as it replaced the source.",
            f"Run that command again, or move {beside / 'old'} to {folder / name}. To go on without the source, remove "
            f"{beside}.",
        )
    for source in sorted(folder.glob("[!.]*/")):
        # os.path.isfile: it takes a folder that may not be read, lost+found of a disk, for one without a manifest.
        if not os.path.isfile(source / MANIFEST_NAME) and any(source.glob("train-*.bin")):
            raise DataError(
                f"{source} has shards of a source, and no {MANIFEST_NAME}.",
                "Copy the rest of it, or make the source again. To leave it out, move it out of the data folder.",
            )


def _require_tokenizer(folder: Path, found: str, first: Path, vocabulary: DataManifest) -> None:
    if found != vocabulary.tokenizer_sha256:
        raise DataError(
            f"The tokens of {folder} were made by another tokenizer than those of {first}.",
            "Make one of them again with the other's tokenizer (tools/tokenize_corpus.py).",
        )
