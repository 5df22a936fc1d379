"""What a source is made of: its files by kind, cut into pieces of work that depend on the files alone.

    NAME=PATH[,PATH...]  PATH: a file, a folder, or a pattern such as web/*.jsonl.gz

A folder that holds nothing but records (jsonl, parquet) is read as those, another one as a tree of source files, each
of them a document.
"""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gpt4moe.corpus.records import Part, row_group_bytes
from gpt4moe.errors import DataError

KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".jsonl.gz": "jsonl.gz", ".json.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst", ".json.zst": "jsonl.zst", ".parquet": "parquet", ".txt": "text", ".text": "text",
    ".md": "text", ".rst": "text",
}  # fmt: skip
"""By suffix, of a file that is named."""
PACKAGES = {"jsonl.zst": "zstandard", "parquet": "pyarrow"}
"""A kind of file, and the package that reads it."""
TREE_SUFFIXES = frozenset({
    ".asm", ".bash", ".bat", ".c", ".cc", ".cfg", ".clj", ".cmake", ".cpp", ".cs", ".css", ".cu", ".cuh",
    ".cxx", ".dart", ".erl", ".ex", ".exs", ".f", ".f90", ".fs", ".go", ".gradle", ".graphql", ".groovy", ".h",
    ".hh", ".hpp", ".hs", ".html", ".ini", ".java", ".jl", ".js", ".json", ".jsx", ".kt", ".lean", ".lisp",
    ".lua", ".m", ".mk", ".ml", ".mli", ".md", ".nim", ".nix", ".pas", ".php", ".pl", ".pm", ".proto", ".ps1",
    ".py", ".pyi", ".pyx", ".r", ".rb", ".rkt", ".rs", ".rst", ".s", ".sass", ".scala", ".scm", ".scss", ".sh",
    ".sql", ".sv", ".swift", ".tcl", ".tex", ".tf", ".toml", ".ts", ".tsx", ".txt", ".v", ".vb", ".vhd", ".vim",
    ".vue", ".xml", ".yaml", ".yml", ".zig", ".zsh",
})  # fmt: skip
TREE_NAMES = frozenset({"Makefile", "Dockerfile", "CMakeLists.txt", "LICENSE", "README"})
_RECORDS = {".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"}
_PIECE_BYTES = (4 << 20, 256 << 20)
_PACKED = 4
"""A compressed file counts this many times its size: about what text shrinks by."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files of a source, in the order in which they are read."""

    files: Sequence[tuple[str, str, int, int]]
    """Path, kind, bytes, time of its last change in ns."""
    roots: Sequence[tuple[str, int]]
    """What the user named, patterns expanded: path, and how many of `files` it brought."""
    skipped: dict[str, int]
    """Files of folders that are not read, by reason."""

    @property
    def num_bytes(self) -> int:
        return sum(size for _, _, size, _ in self.files)


def find_inputs(
    name: str, paths: Sequence[str], suffixes: frozenset[str] = TREE_SUFFIXES, *, is_tree: bool = False,
    out: Path | None = None,
) -> Inputs:  # fmt: skip
    """
    Args:
        name: of the source.
        suffixes: of the files that are read of a tree.
        is_tree: read folders as trees though they have records too, which are left out.
        out: the data folder that is written: a tree that has it is read without it.
    Raises: DataError for a path that is missing, of an unknown kind, named twice or without a file to read, and for a
        kind whose package is not installed.
    """
    if not all(paths):
        raise DataError(f"Source {name}: a path is empty.", "Take out a comma that is one too many.")
    files: list[tuple[str, str, int, int]] = []
    roots: list[tuple[str, int]] = []
    skipped: Counter[str] = Counter()
    for path in (found for text in paths for found in _expanded(name, text)):
        before = len(files)
        if path.is_dir():
            files += _folder(name, path, suffixes, skipped, is_tree, out)
        elif path.is_file():
            files.append(_entry(path, _kind_of(path)))
        else:
            raise DataError(f"Source {name}: {path} is missing.", "Name a file or folder that exists.")
        if len(files) == before:
            raise DataError(
                f"Source {name}: the folder {path} has no file to read ({_counts(skipped) or 'it is empty'}).",
                "Name its files, or say which suffixes to read, for example --suffixes .py,.txt",
            )
        roots.append((str(path), len(files) - before))
    _require_once(name, files)
    for kind, package in PACKAGES.items():
        if find_spec(package) is None and any(entry[1] == kind for entry in files):
            raise DataError(
                f"Source {name} has {kind} files, and the package {package} is not installed.",
                f"pip install {package} (requirements.txt has the version).",
            )
    return Inputs(files, roots, dict(skipped))


def cut(inputs: Inputs, piece_bytes: int | None = None) -> list[list[Part]]:
    """Pieces of work, each of parts that follow one another. They do not depend on the number of processes."""
    if piece_bytes is None:
        piece_bytes = min(max(inputs.num_bytes // 64, _PIECE_BYTES[0]), _PIECE_BYTES[1])
    pieces: list[list[Part]] = [[]]
    room = piece_bytes
    for part, size in (pair for entry in inputs.files for pair in _parts(entry, piece_bytes)):
        if room < size and pieces[-1]:
            pieces.append([])
            room = piece_bytes
        pieces[-1].append(part)
        room -= size
    return pieces


def _parts(entry: tuple[str, str, int, int], piece_bytes: int) -> Iterator[tuple[Part, int]]:
    path, kind, size, _ = entry
    if kind == "jsonl":
        for start in range(0, max(size, 1), piece_bytes):
            stop = min(size, start + piece_bytes)
            yield Part(path, kind, start, stop), stop - start
    elif kind == "parquet":
        first, held = 0, 0
        sizes = row_group_bytes(path)
        for number, group in enumerate(sizes, start=1):
            held += group
            if held >= piece_bytes or number == len(sizes):
                yield Part(path, kind, first, number), held
                first, held = number, 0
    else:
        yield Part(path, kind, 0, size), size * (_PACKED if kind in ("jsonl.gz", "jsonl.zst") else 1)


def _expanded(name: str, text: str) -> list[Path]:
    if not glob.has_magic(text) or Path(text).exists():
        return [Path(text)]
    found = sorted(glob.glob(text, recursive=True))
    if not found:
        raise DataError(f"Source {name}: nothing matches {text}.", "Check the pattern; quote it for the shell.")
    return [Path(path) for path in found]


def _kind_of(path: Path) -> str:
    for suffix in ("".join(path.suffixes[-2:]).lower(), path.suffix.lower()):
        if suffix in KINDS:
            return KINDS[suffix]
    raise DataError(
        f"{path} has the suffix {path.suffix!r}, which names no kind of file.",
        f"Rename it to one of {' '.join(KINDS)}, or name the folder of a source tree.",
    )


def _folder(
    name: str, root: Path, suffixes: frozenset[str], skipped: Counter[str], is_tree: bool, out: Path | None
) -> list[tuple[str, str, int, int]]:
    found: list[tuple[Path, str]] = []
    aside: Counter[str] = Counter()
    for path in _walk(root, aside, out):
        suffix = "".join(path.suffixes[-2:]).lower() if path.suffix in (".gz", ".zst") else path.suffix.lower()
        if suffix in _RECORDS:
            found.append((path, KINDS[suffix]))
        elif path.suffix.lower() in suffixes or (path.name in TREE_NAMES and suffixes is TREE_SUFFIXES):
            found.append((path, "tree"))
        else:
            aside["other suffix"] += 1
    records = [path for path, kind in found if kind != "tree"]
    if records and (is_tree or len(records) < len(found)):
        if not is_tree:
            raise DataError(
                f"Source {name}: the folder {root} has {len(records)} files of records ({records[0]}) beside "
                f"{len(found) - len(records)} others: what it is does not follow.",
                f"For its records name a pattern, '{root}/**/*.jsonl'; to read it as a source tree without them: "
                f"--tree {name}",
            )
        aside["records in a tree"] += len(records)
        found = [entry for entry in found if entry[1] == "tree"]
    skipped.update(aside)
    return [_entry(path, kind) for path, kind in found]


def _walk(root: Path, aside: Counter[str], out: Path | None) -> Iterator[Path]:
    """Files below a folder, sorted, without hidden ones, links and what lies in `out`."""
    written = os.path.realpath(out) if out is not None else None
    for folder, folders, names in os.walk(root):
        if os.path.realpath(folder) == written:
            aside["the data folder itself"] += 1
            folders.clear()
            continue
        aside["hidden"] += sum(name.startswith(".") for name in (*folders, *names))
        aside["link"] += sum(Path(folder, name).is_symlink() for name in folders)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if name.startswith("."):
                continue
            if not _is_utf8(name):
                aside["name is no UTF-8"] += 1
            elif path.is_symlink() or not path.is_file():
                aside["link"] += 1
            else:
                yield path


def _is_utf8(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _entry(path: Path, kind: str) -> tuple[str, str, int, int]:
    found = path.stat()
    return str(path), kind, found.st_size, found.st_mtime_ns


def require_unchanged(inputs: Inputs) -> None:
    """Raises: DataError for a file whose size or time is not the one that it had when it was found."""
    for path, kind, *known in inputs.files:
        try:
            now = _entry(Path(path), kind)
        except OSError as error:
            raise DataError(f"{path} is gone since this command began.", _CHANGED) from error
        if list(now[2:]) != known:
            raise DataError(f"{path} was changed while this command read it.", _CHANGED)


_CHANGED = "Run the same command again when its files are at rest: what was made of the others is kept."


def _require_once(name: str, files: Sequence[tuple[str, str, int, int]]) -> None:
    seen: set[str] = set()
    for path, *_ in files:
        real = os.path.realpath(path)
        if real in seen:
            raise DataError(f"Source {name} names {path} twice.", "Name each file once: a run sets epochs.")
        seen.add(real)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()) if count)
