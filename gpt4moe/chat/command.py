"""The command of tools/prepare_chat.py."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt4moe.chat.source import ChatFiles, write_chat_source
from gpt4moe.chat.words import read_words
from gpt4moe.data.folder import named, require_named_once
from gpt4moe.errors import ConfigError


def prepare(arguments: Sequence[str], progress: Callable[[int], None]) -> dict[str, Any]:
    """Makes the sources that are asked for. Returns: what each has. Raises: ConfigError, DataError."""
    given = parser().parse_args(list(arguments))
    words = read_words(given.tokenizer, given.template)
    for option in ("source", "valid", "licence"):
        require_named_once(f"--{option}", [name for name, _ in getattr(given, option)])
    valid, licences = dict(given.valid), dict(given.licence)
    unknown = (set(valid) | set(licences)) - {name for name, _ in given.source}
    if unknown:
        raise ConfigError(
            f"--valid or --licence names {min(unknown)}, and --source does not.", "Name the same sources."
        )
    if not 0 <= given.held_out <= 1:
        raise ConfigError(f"--held-out is {given.held_out}.", "It is a share, from 0 to 1.")
    answer = {}
    for name, paths in given.source:
        files = ChatFiles(
            train=_paths(paths), valid=_paths(valid.get(name, "")), held_out_share=given.held_out,
            licence=licences.get(name, "unknown"), skips_bad_rows=given.bad_rows == "skip",
        )  # fmt: skip
        count = write_chat_source(
            given.out, name, files, words, vocab_size=given.vocab_size, progress=progress
        )  # fmt: skip
        answer[name] = {split: asdict(one) for split, one in count.splits.items()} | {"skipped": len(count.skipped)}
    return answer


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="prepare_chat.py", usage="see prepare_chat.py --help", add_help=False)
    found.add_argument("--tokenizer", type=Path, required=True)
    found.add_argument("--template", type=Path)
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--source", action="append", required=True, type=named)
    found.add_argument("--valid", action="append", default=[], type=named)
    found.add_argument("--licence", action="append", default=[], type=named)
    found.add_argument("--held-out", type=float, default=0.01)
    found.add_argument("--bad-rows", choices=("refuse", "skip"), default="refuse")
    found.add_argument("--vocab-size", type=int)
    return found


def _paths(text: str) -> list[Path]:
    return [Path(path) for path in text.split(",") if path]
