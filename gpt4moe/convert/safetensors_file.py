"""Safetensors files of any float type: headers checked, ranges read as fp32, files streamed out. No torch."""

import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from gpt4moe.architecture.rows import Shape
from gpt4moe.checkpoint.storage import FileEntry, block_bytes_for
from gpt4moe.checkpoint.writing import HashingWriter, encoded_header
from gpt4moe.convert.copy_pipeline import CHUNK_ELEMENTS, CopyPipeline
from gpt4moe.errors import ConversionError

BYTES = {"F32": 4, "F16": 2, "BF16": 2}
INDEX = "model.safetensors.index.json"
"""Of a folder with several files: which tensor lies in which."""
Take = Callable[[], np.ndarray]
"""Returns a free buffer (copy_pipeline.py)."""
_LARGEST_HEADER = 100_000_000  # the format's own limit
_CAST_ELEMENTS = 2**17  # small enough that a part and its scratch buffers stay in the cache


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file; `start` is its first byte in the file's data."""

    dtype: str
    shape: Shape
    start: int


class RawFile:
    """A file without hashes, from another program. Its header is checked for consistency, also with the file's size.

    Args:
        ignored: how names of tensors end that are left out, whatever their type.
    Raises: ConversionError when it is truncated, no safetensors file, or of a type that is no float.
    """

    def __init__(self, path: Path, ignored: tuple[str, ...] = ()):
        self.path = path
        try:
            self.tensors, self.data_start = _read_header(path, ignored)
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise ConversionError(
                f"{path} is truncated or no safetensors file ({error}).", "Copy or download the file again."
            ) from error

    def read(self, start: int, end: int) -> np.ndarray:
        """Bytes [start, end) of the data, uint8."""
        try:
            data = np.fromfile(self.path, dtype=np.uint8, count=end - start, offset=self.data_start + start)
        except OSError as error:
            raise ConversionError(f"{self.path} cannot be read: {error}.", "Copy or download it again.") from error
        if data.size != end - start:
            raise ConversionError(f"{self.path} has become shorter.", "Copy or download the file again.")
        return data


def _read_header(path: Path, ignored: tuple[str, ...]) -> tuple[dict[str, StoredTensor], int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if length > min(size - 8, _LARGEST_HEADER):
            raise ValueError(f"its header should have {length} bytes, the file has {size}")
        header = json.loads(file.read(length))
    tensors, end = {}, 0
    listed = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    for name, entry in sorted(listed, key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if ignored and name.endswith(ignored) and start == end:
            end = stop
            continue
        if entry["dtype"] not in BYTES:
            raise ValueError(f"{name} is of type {entry['dtype']}, only {', '.join(BYTES)} are read")
        if start != end or stop - start != prod(entry["shape"]) * BYTES[entry["dtype"]]:
            raise ValueError(f"{name} lies at bytes {start} to {stop}, which its shape or its neighbours contradict")
        tensors[name], end = StoredTensor(entry["dtype"], tuple(entry["shape"]), start), stop
    if 8 + length + end != size:
        raise ValueError(f"its header lists {8 + length + end} bytes, the file has {size}")
    return tensors, 8 + length


def decoded(data: np.ndarray, dtype: str) -> np.ndarray:
    """Values of little-endian bytes, as fp32."""
    if dtype == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(np.float16).astype(np.float32) if dtype == "F16" else data.view(np.float32)


class Rounder:
    """Rounds fp32 to bf16, to nearest, ties to even, as torch does. Reuses its buffers, because new memory is slow."""

    def __init__(self) -> None:
        self.scratch = np.empty(_CAST_ELEMENTS, dtype=np.uint32)
        self.bits = np.empty(0, dtype=np.uint16)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """bf16 bit patterns (uint16) of flat contiguous fp32 values; valid until the next call."""
        if self.bits.size < values.size:
            self.bits = np.empty(values.size, dtype=np.uint16)
        for start in range(0, values.size, _CAST_ELEMENTS):
            part = values[start : start + _CAST_ELEMENTS]
            out, scratch, bits = self.bits[start : start + part.size], self.scratch[: part.size], part.view(np.uint32)
            np.right_shift(bits, 16, out=scratch)
            np.bitwise_and(scratch, 1, out=scratch)
            np.add(scratch, 0x7FFF, out=scratch)
            np.add(scratch, bits, out=scratch)
            np.right_shift(scratch, 16, out=scratch)
            out[:] = scratch
            if np.isnan(part.max()):  # rounding up could turn a NaN into an infinity or a zero
                where = np.isnan(part)
                out[where] = (bits[where] >> 16) | 0x40
        return self.bits[: values.size]


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to write. `values` yields its elements in C order as flat fp32 chunks, in buffers that it takes."""

    key: str
    shape: Shape
    values: Callable[[Take], Iterator[np.ndarray]]

    def size_bytes(self, dtype: str) -> int:
        return prod(self.shape) * BYTES[dtype]

    @classmethod
    def of_array(cls, key: str, array: np.ndarray) -> "NewTensor":
        """Of values in memory, fp32."""
        flat = array.reshape(-1)

        def chunks(take: Take) -> Iterator[np.ndarray]:
            for start in range(0, flat.size, CHUNK_ELEMENTS):
                part = flat[start : start + CHUNK_ELEMENTS]
                chunk = take()[: part.size]
                chunk[:] = part
                yield chunk

        return cls(key, array.shape, chunks)

    @classmethod
    def of_file(cls, key: str, file: RawFile, name: str) -> "NewTensor":
        """The tensor `name` of a file, under another name."""
        stored = file.tensors[name]
        size, item = prod(stored.shape), BYTES[stored.dtype]

        def chunks(take: Take) -> Iterator[np.ndarray]:
            for start in range(0, size, CHUNK_ELEMENTS):
                count = min(CHUNK_ELEMENTS, size - start)
                at = stored.start + start * item
                chunk = take()[:count]
                chunk[:] = decoded(file.read(at, at + count * item), stored.dtype)
                yield chunk

        return cls(key, stored.shape, chunks)


def packed(sizes: list[int], limit: int) -> list[slice]:
    """Groups consecutive tensors into files of at most `limit` bytes. Only one larger tensor makes a larger file."""
    starts, room = [0], limit
    for index, size in enumerate(sizes):
        if size > room and index > starts[-1]:
            starts.append(index)
            room = limit
        room -= size
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def sharded(tensors: list[NewTensor], dtype: str, limit: int) -> dict[str, list[NewTensor]]:
    """File name -> its tensors, in order: one file, or several of at most `limit` bytes."""
    parts = packed([tensor.size_bytes(dtype) for tensor in tensors], limit)
    if len(parts) == 1:
        return {"model.safetensors": tensors}
    return {
        f"model-{number:05d}-of-{len(parts):05d}.safetensors": tensors[part] for number, part in enumerate(parts, 1)
    }


def write_stream(
    path: Path, tensors: list[NewTensor], dtype: str, metadata: dict[str, str], advance: Callable[[int], None]
) -> FileEntry:
    """Writes a file and syncs it. Reading goes on while it writes; a few chunks of a tensor are in memory.

    Args:
        advance: called with the number of bytes written since the last call.
    Returns: the file's size and block hashes.
    """
    rounder = Rounder()
    block_bytes = block_bytes_for(sum(tensor.size_bytes(dtype) for tensor in tensors))
    with path.open("wb") as file:
        data = HashingWriter(file, tensors_header(tensors, dtype, metadata), block_bytes)

        def write(values: np.ndarray) -> None:
            view = memoryview((rounder(values) if dtype == "BF16" else values).data).cast("B")
            data.write(view)
            # The kernel begins to write these pages now, while the next ones are read; fsync then waits for few.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        with CopyPipeline(write) as pipeline:
            for tensor in tensors:
                left = prod(tensor.shape)
                for values in tensor.values(pipeline.take):
                    pipeline.put(values)
                    left -= values.size
                    advance(values.size * BYTES[dtype])
                assert left == 0, f"{tensor.key}: {left} elements left"
        return data.finish(path.name)


def tensors_header(tensors: list[NewTensor], dtype: str, metadata: dict[str, str]) -> bytes:
    """The header of a file of these tensors."""
    layout: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size_bytes(dtype)
        assert tensor.key not in layout, tensor.key
        layout[tensor.key] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    return encoded_header(layout)
