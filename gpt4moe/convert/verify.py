"""Whether two folders hold the same model, in any formats: every tensor, and logits on prompts. No torch.

If one side is bf16 and the other fp32, both are rounded to bf16 first. So a bf16 export equals its source.
"""

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from gpt4moe.architecture.rows import Shape
from gpt4moe.architecture.tensors import Box
from gpt4moe.checkpoint.base import refuse_adapters
from gpt4moe.checkpoint.manifest import NAME as MANIFEST
from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.retention import find_checkpoint
from gpt4moe.config.checksums import changed_files
from gpt4moe.convert.adapters import open_checkpoint
from gpt4moe.convert.copy_pipeline import progress_bar
from gpt4moe.convert.huggingface import open_huggingface
from gpt4moe.convert.inference_layout import INDEX, open_inference_layout
from gpt4moe.convert.model_files import tokenizer_files
from gpt4moe.convert.safetensors_file import Rounder, decoded
from gpt4moe.convert.vision_folder import Vision, encoder_folder, encoder_is_known, has_vision, vision_names, vision_of
from gpt4moe.convert.weights import Weights
from gpt4moe.errors import ConversionError

LOGITS_TOLERANCE = 1e-4
"""Largest difference of a logit that fp32 sums in another order may cause."""

DIFFERENCES = ("different", "other_shape", "only_in_a", "only_in_b", "settings", "copies", "changed_files")
"""Keys of verify's answer, all of them empty when two folders hold the same model."""

Answer = dict[str, Any]
Logits = Callable[[Path, list[list[int]], bool], list[np.ndarray]]
"""(folder, prompts, whether to round weights to bf16 first) -> logits of each prompt, [S, V], fp32."""


def open_weights(path: Path, base: Path | None = None) -> Weights:
    """The weights of a step folder, a run folder (its latest checkpoint), a Hugging Face folder or an inference folder.

    Args:
        base: where the base of a checkpoint of adapters is, if it was moved.
    Raises: ConversionError or CheckpointError when it is none of these, or damaged.
    """
    if _is_ours(path):
        return open_checkpoint(path, base)
    if (path / INDEX).exists():
        return open_inference_layout(path)
    if (path / "config.json").exists():
        return open_huggingface(path)
    raise ConversionError(
        f"{path} is no folder with weights of a known format: it has no {MANIFEST}, {INDEX} or config.json.",
        "Give a step folder, a run folder, a Hugging Face folder (config.json) or one made by to-inference.",
    )


def _is_ours(path: Path) -> bool:
    return (path / MANIFEST).exists() or (path / "checkpoints").is_dir()


def verify(
    a: Path, b: Path, *, tolerance: float = 0.0, base: Path | None = None, encoder: Path | None = None,
    text_only: bool = False,
) -> Answer:  # fmt: skip
    """Compares every weight of `a` and `b`.

    Args:
        tolerance: largest absolute difference that passes.
        base: where the base of a side with adapters is, if it was moved.
        encoder: where the encoder's folder of a checkpoint with vision parts is, if it was moved. Of two checkpoints it
            is that of a side whose folder is gone.
        text_only: leaves vision parts out.
    Returns: lists under the keys of DIFFERENCES (`different` and `other_shape` tensors, names on one side only,
        `settings` that change no shape, unequal `copies` of one tensor, `changed_files` that are not what SHA256SUMS
        says), how much was compared, and `notes`. Vision parts that one side alone has are `only_in` it; an inference
        folder never has any, which a note says.
    Raises: ConversionError or CheckpointError when one is absent or damaged, or `encoder` is of neither.
    """
    left, right = open_weights(a, base), open_weights(b, base)
    pairs: list[tuple[str, Comparable, Comparable]] = [("", left, right)]
    settings = [(left.model.forward_settings, right.model.forward_settings)]
    sides = _with_vision(left, right, text_only=text_only)
    moved = _moved(left, right, encoder)
    seen: list[Vision] = []
    if len(sides) == 2:
        seen = [vision_of(weights, elsewhere) for weights, elsewhere in zip(sides, moved, strict=True)]
        pairs += [("vision: ", seen[0].weights, seen[1].weights), ("encoder: ", seen[0].encoder, seen[1].encoder)]
        settings.append((seen[0].forward_settings(), seen[1].forward_settings()))
    total = 4 * sum(prod(shape) for _, one, other in pairs for shape in _same_shape(one, other).values())
    answer: Answer = {
        "a": str(left.folder), "b": str(right.folder), "compared": 0, "rounded_to_bf16": _is_rounded(left, right),
        "different": [], "other_shape": [], "only_in_a": [], "only_in_b": [],
        "settings": [
            {"setting": name, "a": own[name], "b": value}
            for own, other in settings for name, value in other.items() if name in own and own[name] != value
        ],
        "copies": [f"{weights.folder}: {copy}" for weights in (left, right) for copy in weights.differing_copies()],
        "changed_files": [
            found
            # With a tolerance, weights are what they are: their values are compared.
            for weights in (left, right)
            for found in changed_files(weights.folder, without=".safetensors" if tolerance else "")
        ],
        "notes": _not_compared(left, right, text_only=text_only),
    }  # fmt: skip
    answer["notes"] += [note for one in seen for note in one.encoder.notes()]
    for key, weights in (("only_in_a", left), ("only_in_b", right)):
        answer[key] += [f"vision: {name}" for name in vision_names(weights)] if sides == [weights] else []
    with progress_bar("verify", total) as advance:
        for what, one, other in pairs:
            _compare(answer, what, (one, other), tolerance, advance)
    return answer


class Comparable(Protocol):
    """Tensors by name: Weights, or an Encoder."""

    @property
    def dtype(self) -> str: ...
    @property
    def shapes(self) -> dict[str, Shape]: ...
    def values(self, name: str, boxes: list[Box]) -> Iterator[np.ndarray]: ...


def _compare(
    answer: Answer, what: str, sides: tuple[Comparable, Comparable], tolerance: float, advance: Callable[[int], None]
) -> None:
    """Adds to the answer what differs. what: before names."""
    left, right = sides
    same = _same_shape(left, right)
    for name in same:
        row = _compared(name, left, right, _is_rounded(left, right), advance)
        if row["max_abs"] is None or row["max_abs"] > tolerance:
            answer["different"].append(row | {"tensor": what + name})
    answer["compared"] += len(same)
    answer["other_shape"] += [
        {"tensor": what + name, "a": list(left.shapes[name]), "b": list(right.shapes[name])}
        for name in left.shapes if name in right.shapes and name not in same
    ]  # fmt: skip
    answer["only_in_a"] += [what + name for name in sorted(left.shapes.keys() - right.shapes.keys())]
    answer["only_in_b"] += [what + name for name in sorted(right.shapes.keys() - left.shapes.keys())]


def _same_shape(left: Comparable, right: Comparable) -> dict[str, Shape]:
    theirs = right.shapes
    return {name: shape for name, shape in left.shapes.items() if theirs.get(name) == shape}


def _is_rounded(left: Comparable, right: Comparable) -> bool:
    return "BF16" in (left.dtype, right.dtype) and left.dtype != right.dtype


def _with_vision(left: Weights, right: Weights, *, text_only: bool) -> list[Weights]:
    """The sides whose vision parts count: where the other one can have some too."""
    if text_only or any((weights.folder / INDEX).exists() for weights in (left, right)):
        return []
    return [weights for weights in (left, right) if has_vision(weights)]


def _moved(left: Weights, right: Weights, encoder: Path | None) -> tuple[Path | None, Path | None]:
    """--encoder for each side that it is the encoder of. Raises: ConversionError when it would be compared with itself,
    or is of neither."""
    if encoder is None:
        return None, None
    recorded = [encoder_folder(weights) for weights in (left, right)]
    takes = [folder is not None for folder in recorded]
    if all(takes):
        takes = [folder is not None and not folder.is_dir() for folder in recorded]
        if all(takes) and not (encoder_is_known(left) and encoder_is_known(right)):
            raise ConversionError(
                f"--encoder {encoder}: the encoders' folders of both sides are gone, and not both runs say what was in "
                "them. It would be compared with itself.",
                "Put one of the folders back, or compare the text models alone: --text-only.",
            )
    if not any(takes):
        raise ConversionError(
            f"--encoder {encoder}: it is the encoder of neither side, "
            + ("whose own folders are both there." if all(recorded) else "as neither was trained with a folder."),
            "Leave --encoder out.",
        )
    return (encoder if takes[0] else None), (encoder if takes[1] else None)


def _not_compared(left: Weights, right: Weights, *, text_only: bool) -> list[str]:
    with_vision = [weights for weights in (left, right) if has_vision(weights)]
    if not with_vision or _with_vision(left, right, text_only=False):
        return ["--text-only: vision parts were not compared."] if with_vision and text_only else []
    return [f"An inference folder is a text model: of {with_vision[0].folder} too, it alone was compared."]


def _compared(
    name: str, left: Comparable, right: Comparable, is_rounded: bool, advance: Callable[[int], None]
) -> Answer:
    """(number of elements that differ, largest difference); None for a difference that is not finite."""
    shape = left.shapes[name]
    boxes = [((0,) * len(shape), shape)]
    elements, largest, rounder = 0, 0.0, Rounder()
    for ours, theirs in zip(left.values(name, boxes), right.values(name, boxes), strict=True):
        if is_rounded:
            ours, theirs = (decoded(rounder(values), "BF16") for values in (ours, theirs))
        advance(ours.nbytes)
        differs = ours.view(np.uint32) != theirs.view(np.uint32)
        if differs.any():
            gap = np.abs(ours[differs].astype(np.float64) - theirs[differs])
            elements += int(np.count_nonzero(gap != 0))  # -0.0 equals 0.0, a NaN equals nothing
            largest = max(largest, float(np.nan_to_num(gap, nan=np.inf).max()))
    return {"tensor": name, "elements": elements, "of": prod(shape), "max_abs": largest if largest < np.inf else None}


def require_runnable(*paths: Path) -> None:
    """Raises: ConversionError for an inference folder, which no engine here can run; CheckpointError for adapters."""
    for path in paths:
        if _is_ours(path):
            step = find_checkpoint(path)
            refuse_adapters(step, Manifest.load(step))
        if (path / INDEX).exists():
            raise ConversionError(
                f"{path} is cut for {len(list(path.glob('*.safetensors')))} ranks: nothing here computes its logits.",
                "Leave out --prompts: equal weights give equal logits.",
            )


def verify_logits(
    a: Path, b: Path, prompts: list[list[int]], logits: Logits, *, is_rounded: bool, tolerance: float
) -> Answer:
    """Compares logits at every position of the prompts; `different` lists the prompts beyond the tolerance.

    Args:
        is_rounded: `rounded_to_bf16` of verify: round both sides' weights to bf16; logits are computed in fp32.
    Raises: ConversionError when a folder cannot be read.
    """
    gaps = [
        float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf")
        for ours, theirs in zip(logits(a, prompts, is_rounded), logits(b, prompts, is_rounded), strict=True)
    ]
    return {
        "prompts": len(prompts), "max_abs": max(gaps), "tolerance": tolerance,
        "different": [index for index, gap in enumerate(gaps) if not gap <= tolerance],
    }  # fmt: skip


def read_prompts(file: Path, folders: list[Path]) -> list[list[int]]:
    """Token ids of each line, by the first tokenizer that a folder (or the run of a checkpoint) has.

    Where no folder has a tokenizer, the lines are token ids themselves.

    Raises: ConversionError when the file is empty or cannot be encoded.
    """
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{file} cannot be read ({error}).", "Give a text file in UTF-8.") from error
    texts = [text for text in map(_tokenizer_text, folders) if text is not None]
    if texts:
        try:
            tokenizer = tokenizers.Tokenizer.from_str(texts[0])
        except Exception as error:  # what the library raises
            raise ConversionError(f"tokenizer.json cannot be read ({error}).", "Copy it again.") from error
        prompts = [tokenizer.encode(line, add_special_tokens=False).ids for line in lines]
    else:
        if not all(word.isascii() and word.isdigit() and len(word) < 19 for line in lines for word in line.split()):
            raise ConversionError(
                "No folder has a tokenizer, and the prompts are no token ids.", "Give lines of numbers: 17 4 201."
            )
        prompts = [[int(word) for word in line.split()] for line in lines]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ConversionError(f"{file} has no prompts.", "Write one a line.")
    vocabulary = min(open_weights(folder).model.vocab_size for folder in folders)
    largest = max(map(max, prompts))
    if largest >= vocabulary:
        raise ConversionError(
            f"{file} has token {largest}; the smaller vocabulary has {vocabulary} tokens.",
            f"Give ids below {vocabulary}.",
        )
    return prompts


def _tokenizer_text(folder: Path) -> str | None:
    if (folder / "config.json").exists():
        path = folder / "tokenizer.json"
        return path.read_text(encoding="utf-8") if path.exists() else None
    source = open_checkpoint(folder)
    files, _ = tokenizer_files(source.folder, source.manifest, source.run, None)
    content = files.get("tokenizer.json")
    return None if content is None else content.decode()
