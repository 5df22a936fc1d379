"""A file of any size without its data: a true header, then a hole that reads as zeros and takes no disk.

For rehearsals: sizes, headers, hashes and manifests are those of a real file whose values are all zero, so readers open
it as any other. No torch.
"""

from functools import cache
from pathlib import Path

import xxhash

from gpt4moe.checkpoint.storage import FileEntry, block_bytes_for


def write_hollow(path: Path, header: bytes, data_bytes: int) -> FileEntry:
    """Raises: OSError where the file system has no holes of that size."""
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + data_bytes)
    block_bytes = block_bytes_for(data_bytes)
    whole, rest = divmod(data_bytes, block_bytes)
    hashes = [_hash_of_zeros(block_bytes)] * whole + ([_hash_of_zeros(rest)] if rest else [])
    return FileEntry(
        name=path.name,
        size=len(header) + data_bytes,
        header_bytes=len(header),
        header_hash=xxhash.xxh3_64_hexdigest(header),
        block_bytes=block_bytes,
        block_hashes=hashes,
    )


@cache
def _hash_of_zeros(size: int) -> str:
    return xxhash.xxh3_64_hexdigest(bytes(size))
