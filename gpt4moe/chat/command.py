"""The command of tools/prepare_chat.py."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt4moe.chat.source import ChatFiles, write_chat_source
from gpt4moe.chat.words import read_words
from gpt4moe.data.manifest import SPLITS
from gpt4moe.data.source_command import named, paths_of, require_source_options


def prepare(arguments: Sequence[str], progress: Callable[[int], None]) -> dict[str, Any]:
    """Makes the sources that are asked for. Returns: what each has. Raises: ConfigError, DataError."""
    given = parser().parse_args(list(arguments))
    words = read_words(given.tokenizer, given.template)
    require_source_options(given)
    valid, licences = dict(given.valid), dict(given.licence)
    answer = {}
    for name, paths in given.source:
        files = ChatFiles(
            train=paths_of(paths), valid=paths_of(valid.get(name, "")), held_out_share=given.held_out,
            licence=licences.get(name, "unknown"), skips_bad_rows=given.bad_rows == "skip",
        )  # fmt: skip
        count = write_chat_source(
            given.out, name, files, words, vocab_size=given.vocab_size, progress=progress
        )  # fmt: skip
        answer[name] = {split: asdict(one) for split, one in count.splits.items()} | {"skipped": count.skipped.count}
    return answer


def summary(name: str, facts: dict[str, Any]) -> list[str]:
    """What was made, for a person."""
    lines = [
        f"{name} {split}: {one['conversations']:,} conversations, {one['tokens']:,} tokens, {one['learned']:,} of them "
        f"learned, the longest {one['longest']:,}"
        for split, one in ((split, facts[split]) for split in SPLITS)
    ]
    return [*lines, f"{name}: {facts['skipped']:,} lines skipped"]


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
