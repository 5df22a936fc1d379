"""Damages of valid files, drawn by hypothesis: bytes that change, files that go, JSON and YAML of wrong types anywhere.

A damage is plain data, so that a fault's case can be printed and done again.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
import yaml
from hypothesis import strategies as st

from gpt4moe.config.typed import sealed, unsealed

PARTS = 1000
"""A place in a file is so many thousandths of it."""
WRONG: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 0.5, -0.5, 1e308, float("nan"), float("inf"), 2**31, 2**70, 10**30, "", "x", "1", " ",
    "../../etc/passwd", "/etc/passwd", "a\nb", "\0", "$(touch made)", "${oc.env:HOME}", [], {}, [[]], [1], {"a": 1},
    [None], ["x"], "x" * 5000, [[[[[[]]]]]], "\ud800",
)  # fmt: skip
DEEP = "[" * 50_000
MARKER = "made-by-a-pickle"
PICKLE = b"cposix\nsystem\n(S'touch " + MARKER.encode() + b"'\ntR."
"""Makes the file MARKER in the working folder when it is unpickled."""
BYTES = ("flip", "cut", "delete", "swap", "empty", "noise", "folder", "dangling", "append", "deep", "pickle", "loop")
TREES = ("set", "remove", "add", "double")
_SMALL_HEADER = 8


@dataclass(frozen=True)
class Damage:
    """What befalls one file."""

    file: str
    """Path below the case's folder."""
    how: str
    place: int = 0
    """Of PARTS; of a tree the number of a key, counted round."""
    value: Any = None
    other: str = ""
    """With what it is swapped."""

    def apply(self, folder: Path) -> None:
        path = folder / self.file
        if not path.exists() or path.is_dir() or path.is_symlink():
            return  # another damage of the case took it away
        data = path.read_bytes() if path.is_file() else b""
        if self.how in TREES:
            changed = _changed_tree(path, data, self)
            if changed is not None:
                path.write_bytes(changed)
        elif self.how == "flip" and data:
            place = min(len(data) - 1, self.place * len(data) // PARTS)
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << self.place % 8]) + data[place + 1 :])
        elif self.how == "cut":
            path.write_bytes(data[: self.place * len(data) // PARTS])
        elif self.how == "swap" and (folder / self.other).is_file():
            other = (folder / self.other).read_bytes()
            (folder / self.other).write_bytes(data)
            path.write_bytes(other)
        elif self.how in ("empty", "noise", "append", "deep", "pickle"):
            noise = bytes((n * 197 + self.place) % 256 for n in range(300))
            content = {"empty": b"", "noise": noise, "append": data + noise, "deep": DEEP.encode(), "pickle": PICKLE}
            path.write_bytes(content[self.how])
        elif self.how in ("delete", "folder", "dangling", "loop"):
            path.unlink()
            if self.how == "folder":
                path.mkdir()
            elif self.how != "delete":
                path.symlink_to("nowhere" if self.how == "dangling" else path.name)


def damages(files: Sequence[str]) -> st.SearchStrategy[Damage]:
    """Of one of `files`; half of what befalls a tree's file befalls its tree."""
    trees = [name for name in files if _is_tree(name)]
    places = st.integers(0, PARTS - 1)
    by_bytes = st.builds(Damage, st.sampled_from(files), st.sampled_from(BYTES), places, other=st.sampled_from(files))
    if not trees:
        return by_bytes
    of_trees = st.builds(Damage, st.sampled_from(trees), st.sampled_from(TREES), places, st.sampled_from(WRONG))
    return st.one_of(by_bytes, of_trees, of_trees)


def _is_tree(name: str) -> bool:
    return name.endswith((".json", ".jsonl", ".yaml", ".safetensors"))


def _changed_tree(path: Path, data: bytes, damage: Damage) -> bytes | None:
    """The file with one key of its tree changed: sealed again where it was, a header's hash put right."""
    text = data.decode(errors="replace")
    try:
        if path.suffix == ".safetensors":
            return _changed_header(path, data, damage)
        if path.suffix == ".jsonl":
            lines = text.splitlines()
            at = damage.place % len(lines)
            lines[at] = _dumped(_changed(json.loads(lines[at]), damage), damage)
            return ("\n".join(lines) + "\n").encode(errors="surrogatepass")
        if path.suffix == ".yaml":
            return yaml.safe_dump(_changed(yaml.safe_load(text), damage)).encode(errors="replace")
        body = unsealed(text)
        tree = json.loads(text if body is None else body)
        changed = _dumped(_changed(tree, damage), damage)
        if body is not None and changed.startswith("{") and len(changed) > len("{}"):
            changed = sealed(changed)
        return changed.encode(errors="surrogatepass")
    except (ValueError, yaml.YAMLError, RecursionError, ZeroDivisionError):
        return None  # another damage of the case has been here


def _dumped(tree: Any, damage: Damage) -> str:
    text = json.dumps(tree)
    if damage.how == "double" and text.startswith("{") and len(text) > len("{}"):
        text = text[:-1] + "," + text[1:]
    return text


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(entries)[:40]:
        found += _paths(value, (*path, key))
    return found


def _changed(tree: Any, damage: Damage) -> Any:
    paths = _paths(tree)
    path = paths[damage.place * 7919 % len(paths)]
    if damage.how == "double":
        return tree
    if damage.how == "add":
        if isinstance(tree, dict):
            tree["colour"] = damage.value
        return tree
    if not path:
        return damage.value if damage.how == "set" else {}
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    if damage.how == "set":
        parent[path[-1]] = damage.value
    else:
        del parent[path[-1]]
    return tree


def _changed_header(path: Path, data: bytes, damage: Damage) -> bytes:
    """A header with another content, and the manifest beside it, if there is one, with the hash of that header."""
    (length,) = struct.unpack("<Q", data[:_SMALL_HEADER])
    text = _dumped(_changed(json.loads(data[_SMALL_HEADER : _SMALL_HEADER + length]), damage), damage).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    for manifest in (path.parent / "manifest.json", path.parent / "index.json"):
        body = unsealed(manifest.read_text()) if manifest.is_file() else None
        if body is not None:
            tree = json.loads(body)
            for entry in tree["files"]:
                if entry["name"] == path.name:
                    entry["size"] += len(header) - entry["header_bytes"]
                    entry |= {"header_bytes": len(header), "header_hash": xxhash.xxh3_64_hexdigest(header)}
            manifest.write_text(sealed(json.dumps(tree)))
    return header + data[_SMALL_HEADER + length :]
