"""manifest.json of a data folder: its sources, their sizes and hashes, and the tokenizer that made them.

The manifest is written last and renamed into place, so a folder with a manifest is complete.
"""

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt4moe.data.indexed import MAKE_DATA
from gpt4moe.errors import DataError

MANIFEST_NAME = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitFacts:
    """Sizes of one pair of .bin/.idx files."""

    documents: int
    tokens: int
    bin_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFacts:
    """One source: the files <name>-train and <name>-valid."""

    train: SplitFacts
    valid: SplitFacts
    licence: str
    description: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DataManifest:
    """The content of manifest.json."""

    vocab_size: int
    eos_id: int
    tokenizer: str
    """File name within the folder."""
    tokenizer_sha256: str
    sources: dict[str, SourceFacts]

    @classmethod
    def read(cls, folder: Path) -> "DataManifest":
        """Raises: DataError when the folder has none, or one of another format."""
        path = folder / MANIFEST_NAME
        if not path.is_file():
            what = f"has no {MANIFEST_NAME}" if folder.is_dir() else "does not exist"
            raise DataError(f"data.path={folder} {what}.", MAKE_DATA)
        try:
            return cls._from_dict(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is no data manifest of format {_FORMAT} ({type(error).__name__}: {error}).",
                f"Delete the folder. {MAKE_DATA}",
            ) from error

    @classmethod
    def _from_dict(cls, raw: dict[str, Any]) -> "DataManifest":
        if raw["format"] != _FORMAT:
            raise ValueError(f"format is {raw['format']}")
        sources = {
            name: SourceFacts(
                train=SplitFacts(**facts["train"]), valid=SplitFacts(**facts["valid"]),
                licence=facts["licence"], description=facts["description"],
            )
            for name, facts in raw["sources"].items()
        }  # fmt: skip
        keys = ("vocab_size", "eos_id", "tokenizer", "tokenizer_sha256")
        return cls(**{key: raw[key] for key in keys}, sources=sources)

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST_NAME, {"format": _FORMAT, **dataclasses.asdict(self)})

    def shares(self, weights: dict[str, float]) -> dict[str, float]:
        """Normalised sample share of each source whose weight is above 0. Without weights: by training tokens.

        Raises: DataError for a weight of an unknown source.
        """
        for name in weights:
            if name not in self.sources:
                raise DataError(
                    f"data.sources.{name} is not in the data folder.",
                    f"Its sources are {', '.join(self.sources)}; leave data.sources empty to take all by their tokens.",
                )
        by_tokens = {name: float(facts.train.tokens) for name, facts in self.sources.items()}
        chosen = {name: weight for name, weight in sorted((weights or by_tokens).items()) if weight > 0}
        total = math.fsum(chosen.values())
        return {name: weight / total for name, weight in chosen.items()}


def write_json(path: Path, content: Any) -> None:
    """Writes a temporary file and renames it, so that no reader sees half of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
