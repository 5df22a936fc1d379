"""A folder with an image encoder of transformers, checked before anything is loaded. No torch.

config.json               kind and sizes
model.safetensors         weights, or several files with model.safetensors.index.json; their headers are read
preprocessor_config.json  what pixels are normalised by; without it what the kind was published with
"""

import hashlib
import json
from collections.abc import Callable
from math import inf, isclose, isfinite
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from gpt4moe.config.own_files import leads_out, plain_name
from gpt4moe.config.typed import FieldError
from gpt4moe.config.vision import EncoderConfig, EncoderKind
from gpt4moe.errors import ConfigError

Channels = tuple[float, float, float]
"""Red, green, blue; 1 is the brightest."""
KINDS: dict[str, tuple[Channels, Channels]] = {
    "siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip_vision_model": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
"""model_type of config.json -> mean and deviation of pixels that it was published with."""
SAVE_AGAIN = (
    "Save it with transformers: SiglipVisionModel (or CLIPVisionModel).from_pretrained(NAME).save_pretrained(FOLDER), "
    "and AutoImageProcessor.from_pretrained(NAME).save_pretrained(FOLDER)."
)
_WEIGHTS, _INDEX, _PROCESSOR = "model.safetensors", "model.safetensors.index.json", "preprocessor_config.json"
_RESCALED = 1 / 255
"""Of a pixel from 0 to 255 to one from 0 to 1."""
_PIECE = 1 << 24
_SHA256_LETTERS = 64
_SIZES = {
    "image_size": "image_size", "patch_size": "patch_size", "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
}  # fmt: skip
"""Key of model.vision.encoder -> of config.json."""


def model_type(folder: Path) -> str:
    """Raises: ConfigError, as require_encoder."""
    found = _config(folder).get("model_type")
    if found not in list(KINDS):
        raise ConfigError(
            f"model.vision.encoder.folder={folder} has a model of type {found}, not one of {', '.join(KINDS)}.",
            f"Take the vision part alone. {SAVE_AGAIN}",
        )
    return str(found)


def pixel_statistics(folder: Path) -> tuple[Channels, Channels]:
    """Mean and deviation that the encoder's pixels, from 0 to 1, are normalised by: with what do_normalize, do_rescale
    and rescale_factor say. Raises: ConfigError, as require_encoder."""
    mean, deviation = KINDS[model_type(folder)]
    path = folder / _PROCESSOR
    if not path.exists():
        return mean, deviation
    settings = _json(path)
    found = _channels(settings.get("image_mean", mean)), _channels(settings.get("image_std", deviation))
    if found[0] is None or found[1] is None or min(found[1]) <= 0:
        raise ConfigError(
            f"image_mean or image_std of {path} is not three numbers, or a deviation is not above 0.", SAVE_AGAIN
        )
    if settings.get("do_normalize", True):
        mean, deviation = found[0], found[1]
    else:
        mean, deviation = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    factor = settings.get("rescale_factor", _RESCALED) if settings.get("do_rescale", True) else 1.0
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < inf:
        raise ConfigError(f"rescale_factor={factor} of {path} is not above 0.", SAVE_AGAIN)
    if isclose(factor, _RESCALED):
        return mean, deviation
    scale = _RESCALED / factor
    return _scaled(mean, scale), _scaled(deviation, scale)


def require_encoder(config: EncoderConfig) -> None:
    """Raises: ConfigError when the folder is gone, of another kind or size than model.vision.encoder, without weights,
    or has a damaged file."""
    if config.kind is not EncoderKind.folder:
        return
    folder = Path(config.folder or "")
    model_type(folder)
    stored = _config(folder)
    for ours, theirs in _SIZES.items():
        if theirs not in stored:
            raise ConfigError(f"{folder / 'config.json'} has no {theirs}.", SAVE_AGAIN)
        if stored[theirs] != getattr(config, ours):
            raise ConfigError(
                f"model.vision.encoder.{ours}={getattr(config, ours)}, but {theirs} of {folder} is {stored[theirs]}.",
                f"Set model.vision.encoder.{ours}={stored[theirs]}, or give another folder.",
            )
    pixel_statistics(folder)
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} is missing, truncated or no safetensors file ({error}).", SAVE_AGAIN) from error


def require_same_encoder(folder: Path, known: dict[str, Any] | None) -> dict[str, Any]:
    """Whether a folder has the encoder that a model was trained with, by its files; require_encoder compares sizes.

    Args:
        known: encoder_identity of then; None: not known (runs begun before 2026-11-30), nothing is compared.
    Returns: encoder_identity of now.
    Raises: ConfigError when it is another one; as require_encoder.
    """
    found = encoder_identity(folder)
    if known is not None:
        now, then = ({"weights": one["weights"], **one["settings"]} for one in (found, known))
        other = [f"{name} {_short(now.get(name))}, not {_short(then.get(name))}" for name in {**then, **now}
                 if now.get(name) != then.get(name)]  # fmt: skip
        if other:
            raise ConfigError(
                f"{folder} has another encoder than the model was trained with: {'; '.join(other)}.",
                "Name the folder that has its encoder with --encoder, or put the first files back.",
            )
    return found


def _short(value: Any) -> str:
    return f"sha256 {value[:12]}..." if isinstance(value, str) and len(value) == _SHA256_LETTERS else str(value)


def encoder_identity(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """What decides an encoder's features, beside the sizes that require_encoder compares: for a run's identity.

    Args:
        progress: called with the bytes of weights that have been read, and their number.
    Returns: "weights": sha256 of the file, of several files that of their names and hashes; "settings": the values of
        config.json and preprocessor_config.json that features depend on.
    Raises: ConfigError, as require_encoder.
    """
    stored, (mean, deviation) = _config(folder), pixel_statistics(folder)
    files, hashes, done = _weight_files(folder), dict[str, str](), 0
    try:
        total = sum(path.stat().st_size for path in files)
        for path in files:
            digest = hashlib.sha256()
            with path.open("rb") as stream:
                while piece := stream.read(_PIECE):
                    digest.update(piece)
                    done += len(piece)
                    progress(done, total)
            hashes[path.name] = digest.hexdigest()
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}.", SAVE_AGAIN) from error
    together = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    return {
        "weights": together if len(hashes) > 1 else hashes[files[0].name],
        "settings": {
            "model_type": model_type(folder), **{name: stored.get(name) for name in ("hidden_act", "layer_norm_eps")},
            "image_mean": list(mean), "image_std": list(deviation),
        },
    }  # fmt: skip


def _own(path: Path) -> Path:
    """Raises: ConfigError for a link that leads out of its folder (config.own_files)."""
    elsewhere = leads_out(path)
    if elsewhere is not None:
        raise ConfigError(f"{path} is a link to {elsewhere}, out of its folder.", "Copy the file itself: cp -L.")
    return path


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).exists():
        return [_own(folder / _WEIGHTS)]
    if not (folder / _INDEX).exists():
        others = ", ".join(sorted(path.name for path in folder.glob("*.bin")))
        raise ConfigError(
            f"model.vision.encoder.folder={folder} has no {_WEIGHTS}"
            + (f", only {others}: such files can run code, so they are not read." if others else "."),
            SAVE_AGAIN,
        )
    files = _json(folder / _INDEX).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ConfigError(f"{folder / _INDEX} names no files (weight_map).", SAVE_AGAIN)
    try:
        return [_own(folder / plain_name(name)) for name in sorted(set(files.values()))]
    except FieldError as error:
        raise ConfigError(f"weight_map of {folder / _INDEX}: {error}.", SAVE_AGAIN) from error


def _scaled(channels: Channels, scale: float) -> Channels:
    red, green, blue = channels
    return red * scale, green * scale, blue * scale


def _channels(given: Any) -> Channels | None:
    if not isinstance(given, (list, tuple)) or len(given) != 3:
        return None
    if not all(isinstance(one, (int, float)) and isfinite(one) for one in given):
        return None
    return float(given[0]), float(given[1]), float(given[2])


def _config(folder: Path) -> dict[str, Any]:
    return _json(folder / "config.json")


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(_own(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        loaded = None
    if not isinstance(loaded, dict):
        raise ConfigError(f"model.vision.encoder.folder={path.parent} has no {path.name} that can be read.", SAVE_AGAIN)
    return loaded
