"""Token files that several benchmarks read: in Megatron's format, a source of ours, a dataset of Megatron."""

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np


def tokenizer_file(path: Path) -> Path:
    """A tokenizer at `path`, made if it isn't there."""
    from gpt4moe.data.tokenizer import train_tokenizer

    if not path.exists():
        train_tokenizer(["some text"], vocab_size=257).backend.save(str(path))
    return path


def write_pair(prefix: Path, *, documents: int, document_tokens: int, dtype: str, is_sparse: bool = False) -> Path:
    """Documents of random tokens, each ended by the token 0, and 1000 for validation at <prefix>-valid.

    Args:
        is_sparse: all tokens are 0, and take no room on disk.
    """
    for path, count in ((prefix, documents), (prefix.with_name(f"{prefix.name}-valid"), 1000)):
        kind = np.dtype(dtype)
        rng = np.random.default_rng(count)
        chunk = max(1, (1 << 24) // document_tokens)
        sparse_file(Path(f"{path}.bin"), count * document_tokens * kind.itemsize if is_sparse else 0)
        with Path(f"{path}.bin").open("r+b") as stream:
            for start in () if is_sparse else range(0, count, chunk):
                rows = rng.integers(1, 256, (min(chunk, count - start), document_tokens), dtype=kind)
                rows[:, -1] = 0
                stream.write(rows.tobytes())
        with Path(f"{path}.idx").open("wb") as stream:
            stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8 if dtype == "uint16" else 4, count, count + 1))
            stream.write(np.full(count, document_tokens, dtype="<i4").tobytes())
            stream.write((np.arange(count, dtype="<i8") * document_tokens * kind.itemsize).tobytes())
            stream.write(np.arange(count + 1, dtype="<i8").tobytes())
    return prefix


def sparse_file(path: Path, size: int) -> None:
    """A file that reads as zeros."""
    with path.open("wb") as stream:
        stream.truncate(size)


def registered(folder: Path, name: str, pair: Path, *, seq_length: int) -> list[str]:
    """The pair as a registered source, and overrides of a run that reads it."""
    from gpt4moe.data.register import register

    out = folder / f"{name}-data"
    if not out.exists():
        register(
            out, "web", train=[pair], valid=[pair.with_name(f"{pair.name}-valid")],
            tokenizer_path=tokenizer_file(folder / "t.json"), licence="", progress=lambda path: None,
        )  # fmt: skip
    return ["+experiment=tiny", f"data.path={out}", "model.vocab_size=257", f"model.seq_length={seq_length}"]


def megatron_dataset(prefix: Path, cache: Path, *, samples: int, seq_length: int, by_document: bool = False) -> Any:
    """Megatron-core's GPTDataset of a pair, in one shuffled pass: files mapped, no attention mask made.

    Args:
        by_document: positions begin anew in each document, whose last label counts no longer.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=1, sequence_length=seq_length, blend=([str(prefix)], None), split="1,0,0", path_to_cache=str(cache),
        reset_position_ids=by_document, reset_attention_mask=False, eod_mask_loss=by_document,
        create_attention_mask=False, tokenizer=SimpleNamespace(eod=0, vocab_size=257, unique_identifiers={}),
    )  # fmt: skip
    train, *_ = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()
    return train
