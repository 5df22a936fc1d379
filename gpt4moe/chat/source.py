"""Files of chat lines -> a source of a data folder: tokens of whole conversations, their masks, and what was left out.

FOLDER/tokenizer/                  tokenizer and chat template, as Hugging Face has them
FOLDER/<source>/train-00000.bin .idx .sums        a document is a conversation
FOLDER/<source>/train-mask-00000.bin .idx .sums   a byte a token; 1: it is learned
FOLDER/<source>/train-origins.json                file and line of each conversation
FOLDER/<source>/skipped.jsonl                     lines that were left out, with the reason; 10,000 at most
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gpt4moe.chat.encode import Encoded, Encoder
from gpt4moe.chat.rows import conversation_of
from gpt4moe.chat.words import TEMPLATE_FILE, TOKENIZER_FOLDER, ChatWords
from gpt4moe.data.folder import (
    LeftOut,
    finish_folder,
    held_out,
    new_source,
    require_both_splits,
    require_source_name,
    vocabulary_of,
)
from gpt4moe.data.indexed_writer import SHARD_BYTES, ShardWriter, token_dtype
from gpt4moe.data.lines import parsed, text_lines
from gpt4moe.data.manifest import Shard, SourceManifest
from gpt4moe.data.origins import Origins
from gpt4moe.errors import DataError, Gpt4MoeError

SKIPPED_FILE = "skipped.jsonl"
_SHOWN = 5
_EXAMPLE = "one JSON object a line"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFiles:
    """What a source is made of."""

    train: Sequence[Path]
    valid: Sequence[Path] = ()
    """Empty: a share of `train` is held out."""
    held_out_share: float = 0.01
    licence: str = "unknown"
    skips_bad_rows: bool = False
    """Bad lines are left out and listed. False: they are an error."""


@dataclass(kw_only=True, slots=True)
class SplitCount:
    """Of one split."""

    conversations: int = 0
    tokens: int = 0
    learned: int = 0
    longest: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatCount:
    """Of a source."""

    splits: dict[str, SplitCount] = field(default_factory=lambda: {"train": SplitCount(), "valid": SplitCount()})
    skipped: LeftOut = field(default_factory=LeftOut)
    """{"where", "reason", "cure"} of the lines that were left out."""


def write_chat_source(
    folder: Path, name: str, files: ChatFiles, words: ChatWords, *, vocab_size: int | None = None,
    progress: Callable[[int], None] = lambda lines: None, shard_bytes: int = SHARD_BYTES,
) -> ChatCount:  # fmt: skip
    """Writes a source in place of an older one of its name.

    Args:
        vocab_size: of the model, where it is larger than the tokenizer's.
        progress: called with the number of lines just read.
    Raises: DataError for a bad line unless they are skipped, a split without a conversation, another tokenizer or chat
        template than the folder's. The older source stays then.
    """
    require_source_name(name)
    if name == TOKENIZER_FOLDER:
        raise DataError(f"{name} cannot name a source: the chat template lies there.", "Choose another name.")
    vocabulary = vocabulary_of(folder, words.tokenizer, words.path, vocab_size, replaced=[name])
    _require_template(folder, words)
    count, encoder = ChatCount(), Encoder(words)
    with new_source(folder / name) as new:
        splits = {split: _Split(new, split, vocabulary.vocab_size, shard_bytes) for split in count.splits}
        for split, found, where in _encoded(files, encoder, count.skipped, progress):
            splits[split].add(found, where)
            _add(count.splits[split], found)
        if count.skipped.count and not files.skips_bad_rows:
            raise _bad_rows(count.skipped)
        require_both_splits(
            name, {split: one.conversations for split, one in count.splits.items()}, "conversation",
            held_out_share=None if files.valid else files.held_out_share, left_out=count.skipped,
            other_cure=f", or name held-out files: --valid {name}=FILE",
        )  # fmt: skip
        shards = {split: one.finish() for split, one in splits.items()}
        SourceManifest(
            tokenizer_sha256=vocabulary.tokenizer_sha256, licence=files.licence,
            description=", ".join(path.name for path in (*files.train, *files.valid)), train=shards["train"][0],
            valid=shards["valid"][0], masks={split: masks for split, (_, masks) in shards.items()},
        ).write(new)  # fmt: skip
        count.skipped.write(new / SKIPPED_FILE)
    words.write(folder / TOKENIZER_FOLDER, encoder.learned_ends)
    finish_folder(folder, vocabulary, words.path)
    return count


class _Split:
    """Shards of tokens and of masks that are being written."""

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_bytes: int):
        self.folder, self.split, self.shard_bytes = folder, split, shard_bytes
        self.tokens = ShardWriter(folder / split, token_dtype(vocab_size))
        self.masks = ShardWriter(folder / f"{split}-mask", np.dtype("u1"))
        self.origins = Origins()

    def add(self, found: Encoded, where: str) -> None:
        file, _, line = where.rpartition(":")
        self.origins.add(file, int(line))
        self.tokens.add(found.tokens)
        self.masks.add(found.mask)
        if self.tokens.num_bytes >= self.shard_bytes:
            self._close()

    def finish(self) -> tuple[list[Shard], list[Shard]]:
        """The shards of tokens and those of masks."""
        self._close()
        self.origins.write(self.folder, self.split)
        return self.tokens.shards, self.masks.shards

    def _close(self) -> None:
        self.tokens.close()
        self.masks.close()


def _encoded(
    files: ChatFiles, encoder: Encoder, skipped: LeftOut, progress: Callable[[int], None]
) -> Iterator[tuple[str, Encoded, str]]:
    """Split and conversation of each good line, and its file and number."""
    for paths, given in ((files.train, None), (files.valid, "valid")):
        for line, where in text_lines(paths):
            progress(1)
            try:
                found = encoder.encode(conversation_of(parsed(where, line, _EXAMPLE), where), where)
            except Gpt4MoeError as error:
                cause = error.cause if error.cause.startswith(where) else f"{where}: {error.cause}"
                skipped.add(where=where, reason=cause, cure=error.cure)
                continue
            is_valid = not files.valid and held_out(line.strip(), files.held_out_share)
            yield given or ("valid" if is_valid else "train"), found, where


def _add(count: SplitCount, found: Encoded) -> None:
    count.conversations += 1
    count.tokens += len(found.tokens)
    count.learned += int(found.mask[1:].sum())
    count.longest = max(count.longest, len(found.tokens))


def _bad_rows(skipped: LeftOut) -> DataError:
    first = skipped.listed[0]
    if skipped.count == 1:
        return DataError(first["reason"], first["cure"])
    shown = " | ".join(one["reason"] for one in skipped.listed[:_SHOWN])
    return DataError(
        f"{skipped.count:,} lines cannot be learned from: {shown}{' | ...' if skipped.count > _SHOWN else ''}",
        f"{first['cure']} To leave such lines out, --bad-rows skip lists them in {SKIPPED_FILE}.",
    )


def _require_template(folder: Path, words: ChatWords) -> None:
    file = folder / TOKENIZER_FOLDER / TEMPLATE_FILE
    if file.is_file() and file.read_text(encoding="utf-8") != words.template.source:
        raise DataError(
            f"The conversations of {folder} were made with another chat template: {file}.",
            "Use that one (--template), or write to another folder.",
        )
