"""What is read: indexed token files with weights, or synthetic tokens that need no files."""

from dataclasses import dataclass, field
from enum import Enum

from gpt4moe.errors import ConfigError


class DataKind(str, Enum):
    """Where tokens come from."""

    indexed = "indexed"
    mock = "mock"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    kind: DataKind = DataKind.mock
    """indexed: Megatron .bin/.idx files in `path`. mock: tokens from a counter generator, no files."""
    path: str | None = None
    """Folder with manifest.json and <source>-{train,valid}.{bin,idx}."""
    tokenizer: str | None = None
    """tokenizer.json of the `tokenizers` library; null: the one in `path`."""
    sources: dict[str, float] = field(default_factory=dict)
    """Source name -> share of samples; shares are normalised. Empty: every source by its tokens."""

    def validate(self) -> None:
        if self.kind is DataKind.indexed and not self.path:
            raise ConfigError("data.path is not set.", "Set data.path=FOLDER, or data=mock for synthetic tokens.")
        for name, weight in self.sources.items():
            if weight < 0 or not sum(self.sources.values()):
                raise ConfigError(
                    f"data.sources.{name}={weight} is not a share.", "Give shares of 0 or more, one above 0."
                )
