"""One piece of work: documents of its parts in, token files out. It is whole once its .json is there.

read --empty, contaminated: out--> held out by hash --fill in the middle--> tokens, EOS --> piece-00007.*

.train.tokens .valid.tokens      as a shard's .bin
.train.lengths .valid.lengths    uint32 of each document, with EOS
.keys .splits .sizes             of all documents in input order, to find duplicates: 16 bytes; 1 byte, 1 = valid,
                                 2 = its middle comes last; uint32, bytes of its text
.counts                          int64 [V], every 16th token
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpt4moe.corpus.decontamination import Decontamination
from gpt4moe.corpus.duplicates import duplicate_key
from gpt4moe.corpus.encoder import Encoder, unknown_id
from gpt4moe.corpus.fill_in_the_middle import FillInTheMiddle, token_ids
from gpt4moe.corpus.quality import STRIDE
from gpt4moe.corpus.records import Advance, Notes, Part, place_of, read_part
from gpt4moe.data.folder import held_out
from gpt4moe.data.indexed_writer import token_dtype
from gpt4moe.data.manifest import SPLITS, write_json
from gpt4moe.durable import sync_file, sync_folder

_BATCH_BYTES = 1 << 22
_WRITE_BYTES = 1 << 19
"""Most that is written at once: ext4 of Linux 6.18 took 2 MiB and more with up to eight times the processor time."""
_PROOF = (1 << 11, 1 << 15, 16384)
"""Bytes of a piece's first documents whose ids must be equal in both libraries: least, most, and one in so many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What is done with the documents of a source. All of it goes into the plan, so a change begins the work anew."""

    tokenizer: str
    tokenizer_sha256: str
    library: str
    """encoder.Encoder."""
    field: str = "text"
    held_out: float = 0.01
    deduplicate: bool = False
    evaluation: Sequence[str] = ()
    evaluation_sha256: Sequence[str] = ()
    words: int = 13
    """In a row, that an evaluation file must not have."""
    fim_rate: float = 0.0
    fim_spm_share: float = 0.5
    fim_tokens: Sequence[str] | None = None
    seed: int = 1


class Kitchen:
    """What a process opens once to work on pieces."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        path = Path(recipe.tokenizer)
        self.encoder = Encoder(path, recipe.library)
        tokenizer = self.encoder.tokenizer
        self.vocab_size, self.eos_id, self.unknown = tokenizer.vocab_size, tokenizer.eos_id, unknown_id(tokenizer)
        self.dtype = token_dtype(self.vocab_size)
        paths = [Path(path) for path in recipe.evaluation]
        self.decontamination = Decontamination(paths, recipe.words) if paths else None
        self.fim = None
        if recipe.fim_rate:
            ids = token_ids(tokenizer, recipe.fim_tokens)
            self.fim = FillInTheMiddle(recipe.fim_rate, recipe.fim_spm_share, recipe.seed, ids)

    @cached_property
    def plain(self) -> Encoder:
        """For a piece whose first documents the faster library encodes otherwise."""
        return Encoder(Path(self.recipe.tokenizer), "tokenizers")


@dataclass(slots=True)
class PieceFacts:
    """A piece's .json."""

    library: str
    key: str
    """Hash of its parts, the times of their files, and the recipe."""
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    unknown: int = 0
    filled: int = 0
    """Documents whose middle comes last."""
    removed: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    contaminated: list[dict[str, Any]] = field(default_factory=list)
    """Place and match of each; of a jsonl the part and the line within it, which result.py counts on from the file's
    first part."""
    lines: list[tuple[str, int]] = field(default_factory=list)
    """Of each part: path and lines."""
    files: list[tuple[str, str]] = field(default_factory=list)
    """Path and sha256 of each file that is a document."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Suffix and bytes of each of the piece's files."""

    @classmethod
    def read(cls, path: Path) -> "PieceFacts":
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def piece_path(work: Path, number: int, suffix: str) -> Path:
    return work / f"piece-{number:06}.{suffix}"


def write_in_steps(stream: BinaryIO, data: bytes | memoryview) -> None:
    """Writes all of it, a little at a time."""
    view = memoryview(data).cast("B")
    for start in range(0, len(view), _WRITE_BYTES):
        stream.write(view[start : start + _WRITE_BYTES])


def make_piece(path: Path, parts: Sequence[Part], key: str, kitchen: Kitchen, advance: Advance) -> None:
    """Writes the files of a piece beside `path`, its .json, which comes last.

    Args:
        key: PieceFacts.key.
    Raises: DataError for a document that cannot be read.
    """
    facts = PieceFacts(kitchen.recipe.library, key)
    with ExitStack() as stack:
        proof_bytes = min(max(sum(part.stop - part.start for part in parts) // _PROOF[2], _PROOF[0]), _PROOF[1])
        writer = _Writer(path, kitchen, facts, stack)
        writer.proof_bytes = proof_bytes
        for batch in _batches(parts, kitchen, facts, advance):
            writer.add(batch)
        writer.close()
    for suffix in writer.suffixes:
        written = path.with_suffix(f".{suffix}")
        sync_file(written)
        facts.sizes[suffix] = written.stat().st_size
    sync_folder(path.parent)
    write_json(path, dataclasses.asdict(facts))


@dataclass(slots=True)
class _Batch:
    texts: list[str] = field(default_factory=list)
    data: list[bytes] = field(default_factory=list)
    size: int = 0


def _batches(parts: Sequence[Part], kitchen: Kitchen, facts: PieceFacts, advance: Advance) -> Iterator[_Batch]:
    removed: Counter[str] = Counter()
    notes = Notes()
    batch = _Batch()
    find = kitchen.decontamination.find if kitchen.decontamination is not None else None
    for number, part in enumerate(parts):
        is_lines = part.kind.startswith("jsonl")
        for text, data, place in read_part(part, kitchen.recipe.field, advance, notes):
            if not data:
                removed["empty"] += 1
                continue
            if find is not None and (match := find(text)) is not None:
                removed["contaminated"] += 1
                where = {"part": number, "line": place} if is_lines else {"document": place_of(part, place)}
                facts.contaminated.append({**where, **dataclasses.asdict(match)})
                continue
            batch.texts.append(text)
            batch.data.append(data)
            batch.size += len(data)
            if batch.size >= _BATCH_BYTES:
                yield batch
                batch = _Batch()
        if not is_lines:
            notes.lines.append((part.path, 0))
    if batch.data:
        yield batch
    facts.removed, facts.skipped = dict(removed), dict(notes.skipped)
    facts.files, facts.lines = notes.files, notes.lines


class _Writer:
    """The files of a piece."""

    def __init__(self, path: Path, kitchen: Kitchen, facts: PieceFacts, stack: ExitStack):
        self.kitchen, self.facts = kitchen, facts
        self.encoder: Encoder | None = None
        self.proof_bytes = _PROOF[1]
        self.counts: NDArray[np.int64] = np.zeros(kitchen.vocab_size, dtype=np.int64)
        self.counts_path = path.with_suffix(".counts")
        self.suffixes = ["counts"]

        def opened(suffix: str) -> BinaryIO:
            self.suffixes.append(suffix)
            return stack.enter_context(path.with_suffix(f".{suffix}").open("wb"))

        self.tokens = {split: opened(f"{split}.tokens") for split in SPLITS}
        self.lengths = {split: opened(f"{split}.lengths") for split in SPLITS}
        self.keys: BinaryIO | None = None
        self.splits: BinaryIO | None = None
        self.sizes: BinaryIO | None = None
        if kitchen.recipe.deduplicate:
            self.keys, self.splits, self.sizes = opened("keys"), opened("splits"), opened("sizes")

    def add(self, batch: _Batch) -> None:
        share = self.kitchen.recipe.held_out
        is_valid = [share > 0 and held_out(data, share) for data in batch.data]
        is_filled = [False] * len(is_valid)
        if self.kitchen.fim is None:
            ids, ends = self._encode(batch.data)
            self._count(ids)
        else:
            ids, ends, is_filled = self._filled(self.kitchen.fim, batch, is_valid)
            self.facts.filled += sum(is_filled)
        sizes = np.array([len(data) for data in batch.data])
        if self.keys is not None and self.splits is not None and self.sizes is not None:
            self.keys.write(b"".join(map(duplicate_key, batch.texts, batch.data)))
            self.splits.write(bytes(valid + 2 * filled for valid, filled in zip(is_valid, is_filled, strict=True)))
            self.sizes.write(sizes.astype("<u4").tobytes())
        for split, tokens, lengths in self._split(ids, ends, is_valid):
            write_in_steps(self.tokens[split], tokens.data)
            self.lengths[split].write(lengths.astype("<u4").tobytes())
            self.facts.documents[split] += len(lengths)
            self.facts.tokens[split] += len(tokens)
            self.facts.bytes[split] += int(sizes[np.array(is_valid) == (split == "valid")].sum())

    def _split(
        self, ids: NDArray[np.uint32], ends: NDArray[np.int64], is_valid: Sequence[bool]
    ) -> Iterator[tuple[str, NDArray[Any], NDArray[np.int64]]]:
        """Of each split that has a document of a batch: its tokens, an EOS behind each document, and their lengths."""
        lengths, chosen = np.diff(ends, prepend=0) + 1, np.array(is_valid, dtype=np.bool_)
        found = [(split, lengths[chosen == (split == "valid")]) for split in SPLITS]
        # Filled with EOS: what no document covers is the place behind one.
        tokens = [np.full(int(part.sum()), self.kitchen.eos_id, dtype=self.kitchen.dtype) for _, part in found]
        filled, start = [0, 0], 0
        for end, valid in zip(ends.tolist(), is_valid, strict=True):
            at = filled[valid]
            stop = at + end - start
            tokens[valid][at:stop] = ids[start:end]
            filled[valid], start = stop + 1, end
        for (split, part), mine in zip(found, tokens, strict=True):
            if len(part):
                yield split, mine, part

    def _encode(self, data: list[bytes]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        if self.encoder is None:
            size, count = 0, 0
            while count < len(data) and size + len(data[count]) <= self.proof_bytes:
                size += len(data[count])
                count += 1
            proof = data[:count] or [data[0][: self.proof_bytes].decode(errors="ignore").encode()]
            self.encoder = self.kitchen.encoder
            if self.encoder.library != "tokenizers" and not self.encoder.agrees(proof):
                self.encoder = self.kitchen.plain
                self.facts.library = self.encoder.library
        return self.encoder.encode(data)

    def _count(self, ids: NDArray[np.uint32]) -> None:
        self.counts += np.bincount(ids[::STRIDE], minlength=len(self.counts))
        if self.kitchen.unknown is not None:
            self.facts.unknown += int(np.count_nonzero(ids == self.kitchen.unknown))

    def _filled(
        self, fim: FillInTheMiddle, batch: _Batch, is_valid: Sequence[bool]
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64], list[bool]]:
        """As Encoder.encode, of documents some of which are made of several texts and special tokens: which ones."""
        found = [
            None if valid else fim.parts(text, data)
            for text, data, valid in zip(batch.texts, batch.data, is_valid, strict=True)
        ]
        plans: list[list[int | bytes]] = [
            [data] if plan is None else plan for plan, data in zip(found, batch.data, strict=True)
        ]
        ids, ends = self._encode([part for plan in plans for part in plan if isinstance(part, bytes)])
        self._count(ids)
        texts = iter(np.split(ids, ends[:-1]))
        parts = [
            [next(texts) if isinstance(part, bytes) else np.array([part], dtype=ids.dtype) for part in plan]
            for plan in plans
        ]
        lengths = [sum(map(len, document)) for document in parts]
        joined = np.concatenate([part for document in parts for part in document])
        return joined, np.cumsum(lengths, dtype=np.int64), [plan is not None for plan in found]

    def close(self) -> None:
        self.counts_path.write_bytes(self.counts.astype("<i8").tobytes())
