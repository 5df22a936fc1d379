"""Which files of this machine are text worth training on, whose they are and under which licence.

    python   the standard library's sources and tests
    prose    pydoc's topics; manual pages and package documentation, where the machine has them

Only the standard library is promised to be there; everything else is a gain. Nothing found here is ever distributed.
"""

import gzip
import hashlib
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

from gpt4moe.demo.roff import roff_to_text

MANUAL_BYTES, DOCUMENTATION_BYTES = 10_000_000, 4_000_000
# One program with thousands of pages (a cloud's command line) must not become the corpus.
_FAMILY_BYTES = 300_000
_MANUALS = (Path("/usr/share/man"), Path("/usr/local/share/man"))
_DOCUMENTATION = Path("/usr/share/doc")
_PYTHON_LICENCE = "PSF-2.0"
# pydoc_data would bring the prose twice; encodings are tables; ensurepip and site-packages are other people's.
_NOT_LIBRARY = {"site-packages", "dist-packages", "ensurepip", "pydoc_data", "encodings", "__pycache__"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One file's text as it stands in the corpus."""

    path: str
    text: str
    licence: str


def python_sources(library: Path | None = None) -> Iterator[Document]:
    """Every .py of the standard library, its tests too where installed."""
    root = library or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _NOT_LIBRARY.isdisjoint(relative.parts):
            text = _decoded(path)
            if text is not None:
                yield Document(path=f"python/{relative.as_posix()}", text=text, licence=_PYTHON_LICENCE)


def prose_sources() -> Iterator[Document]:
    """Python's help topics, then the manual, then package documentation."""
    for name, text in sorted(topics.topics.items()):
        yield Document(path=f"pydoc/{name}", text=text, licence=_PYTHON_LICENCE)
    licences = _Licences()
    pages = [page for root in _MANUALS for page in root.glob("man[1-8]/*") if not page.is_symlink()]
    yield from _chosen(pages, MANUAL_BYTES, read=_manual_page, family=_program, licences=licences)
    files = [path for kind in ("txt", "md", "rst") for path in _DOCUMENTATION.rglob(f"*.{kind}")]
    files = [path for path in files if not path.is_symlink() and "change" not in path.name.lower()]
    yield from _chosen(files, DOCUMENTATION_BYTES, read=_decoded, family=_documented_package, licences=licences)


class _Licences:
    """Licence of an installed file, by its Debian package; "unknown" on other systems."""

    def __init__(self) -> None:
        self._package: dict[str, str] = {}
        self._licence: dict[str, str] = {}
        for listing in Path("/var/lib/dpkg/info").glob("*.list"):
            package = listing.stem.partition(":")[0]
            for line in listing.read_text(errors="ignore").splitlines():
                if line.startswith(("/usr/share/man/", "/usr/share/doc/")):
                    self._package[line] = package

    def of(self, path: Path) -> str:
        package = self._package.get(str(path))
        if package is None:
            return "unknown"
        if package not in self._licence:
            notice = _DOCUMENTATION / package / "copyright"
            text = notice.read_text(errors="ignore") if notice.is_file() else ""
            named = re.search(r"^Licen[cs]e:\s*(\S.*)$", text, re.MULTILINE)
            self._licence[package] = named[1].strip() if named else f"see {notice}"
        return self._licence[package]


def _chosen(
    paths: list[Path],
    budget_bytes: int,
    *,
    read: Callable[[Path], str | None],
    family: Callable[[Path], str],
    licences: _Licences,
) -> Iterator[Document]:
    """Files in the order of their names' hashes until the budget is full: a fair sample, the same every time."""
    used: dict[str, int] = {}
    for path in sorted(paths, key=lambda path: hashlib.sha256(str(path).encode()).digest()):
        kin = family(path)
        if used.get(kin, 0) >= _FAMILY_BYTES:
            continue
        text = read(path)
        if not text or used.get(kin, 0) + len(text) > _FAMILY_BYTES:
            continue
        used[kin] = used.get(kin, 0) + len(text)
        if sum(used.values()) > budget_bytes:
            return
        yield Document(path=str(path).lstrip("/"), text=text, licence=licences.of(path))


def _program(page: Path) -> str:
    """git-rebase.1.gz -> git"""
    return re.split(r"[-_.:]", page.name, maxsplit=1)[0]


def _documented_package(path: Path) -> str:
    return path.relative_to(_DOCUMENTATION).parts[0]


def _manual_page(path: Path) -> str | None:
    source = _decoded(path)
    return None if source is None else roff_to_text(source)


def _decoded(path: Path) -> str | None:
    """A file as UTF-8 text, unpacked when .gz; None when it is not."""
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (UnicodeDecodeError, OSError, EOFError):
        return None
