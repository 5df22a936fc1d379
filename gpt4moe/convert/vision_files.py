"""Writes the folder vision/ of an export (vision_folder.py). No torch, but to draw a fresh encoder."""

import json
from dataclasses import dataclass
from pathlib import Path

from gpt4moe.config.checksums import SUMS
from gpt4moe.convert.copy_pipeline import Advance
from gpt4moe.convert.encoder_files import PROCESSOR, Encoder
from gpt4moe.convert.folder_tensors import new_tensor
from gpt4moe.convert.publish import Draft
from gpt4moe.convert.rules import require_whole
from gpt4moe.convert.safetensors_file import NewTensor, sharded
from gpt4moe.convert.vision_folder import ENCODER, FOLDER, Vision, vision_of_checkpoint
from gpt4moe.convert.vision_tables import vision_links
from gpt4moe.convert.weights import CheckpointWeights
from gpt4moe.data.image_tokens import IMAGE_TOKEN
from gpt4moe.errors import ConversionError

_LEAVE_OUT = "Leave --image-token out."


def vision_files(
    source: CheckpointWeights, tokenizer: bytes | None, encoder: Path | None, token: str | None, how: tuple[str, int]
) -> "VisionFiles | None":
    """What an export of a checkpoint has in vision/; None: it is a text model's.

    Args:
        tokenizer: tokenizer.json.
        encoder, token: as to_huggingface's.
        how: dtype, of safetensors; bytes of a file of weights at most.
    Raises: ConversionError when the encoder's folder is gone, or for a token that the tokenizer does not have.
    """
    vision = vision_of_checkpoint(source, encoder)
    if vision is None:
        if token is not None:
            raise ConversionError(f"{source.folder} is a text model: no token stands for an image.", _LEAVE_OUT)
        return None
    return VisionFiles.of(vision, image_token(tokenizer, token), *how)


def image_token(tokenizer: bytes | None, asked: str | None) -> tuple[str | None, int | None]:
    """The token that stands for an image and its number, in a tokenizer.json; (None, None) where there is none.

    Args:
        asked: by --image-token; None: IMAGE_TOKEN, if the tokenizer has it.
    Raises: ConversionError when the tokenizer does not have what was asked for.
    """
    name = asked or IMAGE_TOKEN
    added = [] if tokenizer is None else json.loads(tokenizer).get("added_tokens", [])
    number = next((one["id"] for one in added if one["content"] == name and one["special"]), None)
    if number is None and asked is not None:
        has = ", ".join(one["content"] for one in added) or "none"
        raise ConversionError(
            f"--image-token {asked}: the tokenizer has no such special token (it has {has}).",
            "Name the one that stands for an image in its data, or leave the option out.",
        )
    return (name, number) if number is not None else (None, None)


@dataclass(frozen=True, slots=True)
class VisionFiles:
    """What vision/ of an export will have."""

    vision: Vision
    token: tuple[str | None, int | None]
    shards: dict[str, list[NewTensor]]
    """File name in vision/ -> its tensors."""
    dtype: str
    """Of safetensors."""

    @classmethod
    def of(cls, vision: Vision, token: tuple[str | None, int | None], dtype: str, limit: int) -> "VisionFiles":
        """Args: limit: bytes of a file of weights at most."""
        weights = vision.weights
        all_links = list(vision_links(weights.shapes, weights.model))
        require_whole(all_links, weights.shapes)
        return cls(vision, token, sharded([new_tensor(link, weights) for link in all_links], dtype, limit), dtype)

    def sizes(self) -> dict[str, int]:
        """Bytes of weights of each file with weights, by its path in the export."""
        own = {name: sum(tensor.size_bytes(self.dtype) for tensor in part) for name, part in self.shards.items()}
        own |= {f"{ENCODER}/{name}": size for name, size in encoder_bytes(self.vision.encoder).items()}
        return {f"{FOLDER}/{name}": size for name, size in own.items()}

    def identity(self) -> list[object]:
        """What the files follow from, beside the checkpoint's weights."""
        return [self.vision.settings(), self.token, self.vision.encoder.identity]

    def notes(self) -> list[str]:
        notes = [f"{FOLDER}/ has the vision parts: examples/load_vision.py loads them, with torch and transformers."]
        notes += self.vision.encoder.notes()
        if self.token[1] is None:
            notes.append("No image token was found in the tokenizer: name it with --image-token, if it has one.")
        return notes

    def write(self, draft: Draft, advance: Advance) -> None:
        draft.weights(self.shards, self.dtype, advance, under=f"{FOLDER}/")
        config = self.vision.settings() | dict(zip(("image_token", "image_token_id"), self.token, strict=True))
        draft.json(f"{FOLDER}/config.json", config)
        write_encoder(draft, f"{FOLDER}/{ENCODER}", self.vision.encoder, advance)
        draft.checksums(f"{FOLDER}/{SUMS}")


def encoder_bytes(encoder: Encoder) -> dict[str, int]:
    """Bytes of each file that write_encoder takes long for."""
    if encoder.is_copied:
        return {path.name: path.stat().st_size for path in encoder.files()}
    return {"model.safetensors": sum(tensor.size_bytes(encoder.dtype) for tensor in encoder.tensors())}


def write_encoder(draft: Draft, under: str, encoder: Encoder, advance: Advance) -> None:
    """A folder of transformers with the encoder, `under` in the draft."""
    if encoder.is_copied:
        for path in encoder.files():
            draft.copy(f"{under}/{path.name}", path)
            advance(path.stat().st_size)
    else:
        draft.json(f"{under}/config.json", encoder.config)
        draft.weights({"model.safetensors": encoder.tensors()}, encoder.dtype, advance, under=f"{under}/")
    draft.json(f"{under}/{PROCESSOR}", encoder.preprocessor())
