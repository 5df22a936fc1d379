"""The vision parts of a Hugging Face folder as parts of a checkpoint (from_huggingface). No torch.

    vision/ of an export        resampler, gated blocks -> beside the text model's weights
    vision/encoder              -> OUT/encoder, which the checkpoint names as its encoder's folder

Other programs know no vision/: it is read as to-hf writes it.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt4moe.architecture.encoder_folder import encoder_identity
from gpt4moe.config.model import ModelConfig
from gpt4moe.convert.copy_pipeline import Advance
from gpt4moe.convert.publish import Draft
from gpt4moe.convert.vision_files import encoder_bytes, write_encoder
from gpt4moe.convert.vision_folder import ENCODER, FOLDER, Vision, vision_in
from gpt4moe.convert.vision_tables import config_of
from gpt4moe.convert.weights import Weights
from gpt4moe.errors import ConfigError, ConversionError

_UNQUOTED = re.compile(r"[\w./+-]+", re.ASCII)
"""A path that neither a shell nor Hydra reads as anything else."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ImportedVision:
    """Vision parts that become part of a checkpoint."""

    vision: Vision
    encoder_folder: Path
    """Where the encoder will lie."""

    @property
    def weights(self) -> Weights:
        """Of resampler and gated blocks."""
        return self.vision.weights

    @property
    def model(self) -> ModelConfig:
        """Text model and vision parts, with the encoder's new folder."""
        model = self.weights.model
        vision = config_of(model)
        encoder = dataclasses.replace(vision.encoder, folder=str(self.encoder_folder))
        return dataclasses.replace(model, vision=dataclasses.replace(vision, encoder=encoder))

    @property
    def encoder_bytes(self) -> int:
        return sum(encoder_bytes(self.vision.encoder).values())

    def write_encoder(self, draft: Draft, advance: Advance) -> Json:
        """Returns: its identity, for the manifest. Raises: ConversionError for a file that is damaged."""
        write_encoder(draft, ENCODER, self.vision.encoder, advance)
        try:
            return encoder_identity(draft.folder / ENCODER)
        except ConfigError as error:
            raise ConversionError(error.cause, error.cure) from error

    def notes(self) -> list[str]:
        return [f"{self.encoder_folder} has the image encoder: it stays there while the model is used."]


def imported_vision(source: Path, text: ModelConfig, out: Path) -> ImportedVision | None:
    """The vision parts beside the text model of an export; None: there are none.

    Args:
        text: the text model.
        out: the checkpoint that is to be made.
    Raises: ConversionError when they are damaged or of another text model; and for an `out` that model.args could not
        name.
    """
    vision = vision_in(source, text)
    if vision is None:
        return None
    path = source / FOLDER / "config.json"
    # Sizes that no tensor's shape shows: vision_in takes them from the text model.
    _require_own(path, vision.settings(), json.loads(path.read_text(encoding="utf-8")))
    folder = out.absolute() / ENCODER
    if not _UNQUOTED.fullmatch(str(folder)):
        raise ConversionError(
            f"{str(folder)!r}, where the image encoder would lie, has letters that no argument takes without quotes.",
            "Give an OUT whose whole path has letters, digits and . _ - + / alone.",
        )
    return ImportedVision(vision, folder)


def _require_own(path: Path, of_model: Json, stored: Json) -> None:
    """Raises: ConversionError for a setting that text model, encoder and config.json do not agree on."""
    wrong = next((name for name, value in of_model.items() if stored.get(name) != value), None)
    if wrong is not None:
        raise ConversionError(
            f"{path} has {wrong}={stored.get(wrong)!r}, but the text model and the encoder beside it have "
            f"{of_model[wrong]!r}.",
            "Take the whole folder that to-hf wrote: these parts are of several.",
        )
