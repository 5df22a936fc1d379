"""Group data: folders, sources with their shares and epochs, phases."""

import difflib
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from gpt4moe.errors import ConfigError


class DataKind(str, Enum):
    """The source of tokens."""

    indexed = "indexed"
    mock = "mock"


class LongRows(str, Enum):
    """What becomes of a conversation of more than model.seq_length + 1 tokens. refuse: the run. cut: its end is left
    out. split: it becomes several, each without what stood before. What has no trained token left is left out."""

    refuse = "refuse"
    cut = "cut"
    split = "split"  # type: ignore[assignment]  # str has a method of this name


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One source of the mixture. A bare number in its place is its share."""

    share: float | None = None
    """Of samples; divided by the sum of all shares. None in every source: in proportion to tokens x epochs."""
    epochs: float = 1.0
    """How often its tokens are meant to be read, where there are no shares."""
    max_epochs: float | None = None
    """A run that would read it more often is refused; null: no limit."""
    tokens: float | None = None
    """Training tokens of a source that is not on disk yet, for plans. On disk its manifest counts."""
    origin: str = ""
    """Where it is known from; tools/mixture.py prints it."""

    def validate(self, name: str) -> None:
        """Raises: ConfigError."""
        for key in ("share", "epochs", "max_epochs", "tokens"):
            value = getattr(self, key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                least = "0 or more" if key == "share" else "above 0"
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                raise ConfigError(
                    f"data.sources.{name}.{key}={value} is {'not ' + least if is_number else 'no number'}.",
                    f"Give a number, {least}.",
                )
            if value == 0 and key != "share":
                raise ConfigError(f"data.sources.{name}.{key}=0 reads nothing.", f"Set data.sources.{name}.share=0.")
        if self.share is not None and self.epochs != 1.0:
            raise ConfigError(
                f"data.sources.{name} has share={self.share} and epochs={self.epochs}: a share does not follow epochs.",
                "Give one of the two; max_epochs refuses a run that reads it too often.",
            )
        if not isinstance(self.origin, str):
            raise ConfigError(f"data.sources.{name}.origin={self.origin} is no text.", "Quote it.")


@dataclass(kw_only=True, slots=True)
class PhaseConfig:
    """Other shares from a point of the run on. Every source goes on where it was."""

    from_tokens: float = 0
    """Of the run, counted from its beginning."""
    shares: dict[str, float] = field(default_factory=dict)
    """Source -> share of samples. A source that is not named is not read in this phase."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    kind: DataKind = DataKind.mock
    """indexed: Megatron .bin/.idx files in `path`. mock: synthetic tokens, without files."""
    path: Any = None
    """Folder with manifest.json and a folder of shards for each source; or a list of such folders."""
    tokenizer: str | None = None
    """File tokenizer.json of the `tokenizers` library; null: the one in `path`."""
    sources: dict[str, Any] = field(default_factory=dict)
    """Source name -> its share, or a SourceConfig. Empty: all sources, in proportion to their tokens."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """In ascending order. Before the first, `sources` count."""
    validation: dict[str, float] = field(default_factory=dict)
    """Source name -> its share of the held-out samples, also of a source that is not trained on. Empty: the shares that
    training begins with."""
    pack: bool = True
    """stage=sft, stage=vision. true: several conversations, or documents with images, to a sequence, none of which sees
    another. false: one to a sequence."""
    long_rows: LongRows = LongRows.refuse
    """stage=sft: conversations that are longer than the context. stage=vision: documents that are, or have more than
    max_images."""
    max_images: int = 32
    """stage=vision: images of a sequence; a clip is one. Packing puts no more together."""
    document_mask: bool = False
    """A sample has parts of several documents. true: a token attends to its own document alone, positions begin anew
    with each document, and the first token of a document is not predicted. false: as if a sample were one text."""

    chat_as_text: bool = False
    """stage=pretrain. true: conversations are learned as text, every turn of them, the user's too. false: a source of
    them is refused."""

    @property
    def folders(self) -> list[str]:
        return self.path if isinstance(self.path, list) else [] if self.path is None else [self.path]

    @property
    def chosen(self) -> dict[str, SourceConfig]:
        """`sources`, each in full. Raises: ConfigError for an unknown key."""
        return {name: _source(name, value) for name, value in self.sources.items()}

    def validate(self) -> None:
        if self.kind is DataKind.indexed and not self.path:
            raise ConfigError("data.path is not set.", "Set data.path=FOLDER, or data=mock for synthetic tokens.")
        if not all(isinstance(folder, str) and folder for folder in self.folders):
            raise ConfigError(f"data.path={self.path} names no folder.", "Set data.path=FOLDER or data.path=[ONE,TWO].")
        chosen = self.chosen
        for name, source in chosen.items():
            source.validate(name)
        shares = {name: source.share for name, source in chosen.items() if source.share is not None}
        without = next((name for name in chosen if name not in shares), None)
        if without and any(shares.values()):
            raise ConfigError(
                f"data.sources.{next(iter(shares))} has a share, data.sources.{without} has none.",
                "Give every source a share, or none, and epochs in its place.",
            )
        if shares and not without:
            _require_shares("data.sources", shares)
        if self.validation:
            _require_shares("data.validation", self.validation)
        if self.max_images < 1:
            raise ConfigError(f"data.max_images={self.max_images} is below 1.", "Set data.max_images=32.")
        self._validate_phases()

    def phase_of(self, tokens: float) -> int:
        """Which phase's shares a step has that ends after so many tokens; 0: those before the first phase."""
        return sum(phase.from_tokens < tokens for phase in self.phases)

    def _validate_phases(self) -> None:
        last = 0.0
        for number, phase in enumerate(self.phases):
            if not last < phase.from_tokens < float("inf"):
                raise ConfigError(
                    f"data.phases[{number}].from_tokens={phase.from_tokens:g} does not follow {last:g}.",
                    "Put phases in ascending order, the first above 0: data.sources are the shares from 0 on.",
                )
            last = phase.from_tokens
            _require_shares(f"data.phases[{number}].shares", phase.shares)


def _source(name: str, value: Any) -> SourceConfig:
    if isinstance(value, SourceConfig):
        return value
    if not isinstance(value, dict):
        return SourceConfig(share=value)
    known = [one.name for one in fields(SourceConfig)]
    for key in value:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            cure = f"Did you mean {close[0]}?" if close else f"Keys here: {', '.join(known)}."
            raise ConfigError(f"Unknown key data.sources.{name}.{key}.", cure)
    return SourceConfig(**value)


def _require_shares(where: str, shares: Any) -> None:
    for name, share in shares.items():
        if not 0 <= share < float("inf"):
            raise ConfigError(f"{where}.{name}={share} is not a share.", "Give shares of 0 or more, one above 0.")
    if not any(shares.values()):
        raise ConfigError(f"{where} has no share above 0.", "Give shares of 0 or more, one above 0.")
