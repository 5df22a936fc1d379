"""The command of tools/prepare_media.py."""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpt4moe.data.folder import TOKENIZER_NAME
from gpt4moe.data.image_tokens import IMAGE_TOKEN, AddedToken, add_image_token
from gpt4moe.data.manifest import MANIFEST_NAME, SPLITS
from gpt4moe.data.pictures import ImageLimits
from gpt4moe.data.source_command import named, paths_of, require_share, require_source_options
from gpt4moe.errors import ConfigError
from gpt4moe.media.source import MediaFiles, write_media_source


def prepare(arguments: Sequence[str], progress: Callable[[int], None]) -> dict[str, Any]:
    """Makes the sources that are asked for. Returns: what each has. Raises: ConfigError, DataError."""
    given = parser().parse_args(list(arguments))
    _check(given)
    limits = ImageLimits(max_pixels=given.max_pixels, max_bytes=given.max_bytes)
    valid, licences = dict(given.valid), dict(given.licence)
    answer = {}
    with tempfile.TemporaryDirectory() as beside:
        tokenizer = _tokenizer(given, Path(beside) / TOKENIZER_NAME)
        for name, paths in given.source:
            files = MediaFiles(
                train=paths_of(paths), valid=paths_of(valid.get(name, "")), images=given.images,
                held_out_share=given.held_out, licence=licences.get(name, "unknown"),
                skips_bad_rows=given.bad_rows == "skip", max_bad_share=given.max_bad, limits=limits,
                workers=given.workers,
            )  # fmt: skip
            count = write_media_source(
                given.out, name, files, tokenizer, token=given.image_token, vocab_size=given.vocab_size,
                progress=progress,
            )  # fmt: skip
            answer[name] = count.facts
    return answer


def summary(name: str, facts: dict[str, Any]) -> list[str]:
    """What was made, for a person."""
    lines = [
        f"{name} {split}: {one['documents']:,} documents, {one['tokens']:,} tokens, {one['images']:,} images, "
        f"{one['frames']:,} frames, {one['distinct']:,} distinct ({one['image_bytes'] / 1e6:,.1f} MB); at most "
        f"{one['longest']:,} tokens, {one['most_images']} images, {one['most_frames']} frames"
        for split, one in ((split, facts[split]) for split in SPLITS)
    ]
    return [*lines, f"{name}: left out: {facts['bad_images']:,} bad images, {facts['skipped']:,} documents"]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="prepare_media.py", usage="see prepare_media.py --help", add_help=False)
    add = found.add_argument
    add("--tokenizer", type=Path, required=True)
    add("--image-token", default=IMAGE_TOKEN)
    add("--add-image-token", choices=[how.value for how in AddedToken])
    add("--vocab-size", type=int)
    add("--out", type=Path, required=True)
    add("--source", action="append", required=True, type=named)
    add("--valid", action="append", default=[], type=named)
    add("--licence", action="append", default=[], type=named)
    add("--images", type=Path)
    add("--held-out", type=float, default=0.01)
    add("--bad-rows", choices=("refuse", "skip"), default="refuse")
    add("--max-bad", type=float, default=0.01)
    add("--max-pixels", type=int, default=ImageLimits().max_pixels)
    add("--max-bytes", type=int, default=ImageLimits().max_bytes)
    add("--workers", type=int, default=2)
    return found


def _check(given: argparse.Namespace) -> None:
    """Raises: ConfigError for options that mean nothing."""
    require_source_options(given)
    require_share("--max-bad", given.max_bad)
    if given.workers < 1:
        raise ConfigError(f"--workers is {given.workers}.", "It is at least 1.")


def _tokenizer(given: argparse.Namespace, made: Path) -> Path:
    """The tokenizer's file; where a token is added, `made`, or what an earlier call has made of it."""
    path: Path = given.tokenizer / TOKENIZER_NAME if given.tokenizer.is_dir() else given.tokenizer
    if given.add_image_token is None:
        return path
    if (given.out / MANIFEST_NAME).is_file():
        raise ConfigError(
            f"{given.out} has a tokenizer already, so none is made for it.",
            f"Leave --add-image-token out, and give --tokenizer {given.out / TOKENIZER_NAME}.",
        )
    add_image_token(path, made, AddedToken(given.add_image_token), given.image_token)
    return made
