"""Compressed files as streams of lines, of several members or frames too."""

import gzip
import io
from typing import Any, BinaryIO


def unpacked(raw: BinaryIO, kind: str) -> BinaryIO:
    """The lines of a jsonl, jsonl.gz or jsonl.zst. Reading raises EOFError, zlib.error or BadGzipFile for damage."""
    if kind == "jsonl.gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if kind == "jsonl.zst":
        return io.BufferedReader(_Zstandard(raw), 1 << 20)
    return raw


class _Zstandard(io.RawIOBase):
    """Frame after frame. The package's own reader takes a file that was cut short for a whole one."""

    def __init__(self, raw: BinaryIO):
        import zstandard

        self.raw, self.package = raw, zstandard
        self.frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self.ready, self.has_begun = memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            block = (self.frame.unused_data if self.frame.eof else b"") or self.raw.read(1 << 17)
            if not block:
                if self.has_begun and not self.frame.eof:
                    raise EOFError("its last frame has no end")
                return 0
            if self.frame.eof:
                self.frame = self.package.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self.has_begun = True
            try:
                self.ready = memoryview(self.frame.decompress(block))
            except self.package.ZstdError as error:
                raise EOFError(str(error)) from error
        count = min(len(buffer), len(self.ready))
        buffer[:count] = self.ready[:count]
        self.ready = self.ready[count:]
        return count
