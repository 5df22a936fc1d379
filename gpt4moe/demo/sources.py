"""Text of this machine to train on, with its owners and licences.

    python   the standard library's sources and tests
    prose    pydoc's topics, and the docstrings of installed packages (torch, numpy, ... are there wherever this runs)

Nothing found here is ever distributed.
"""

import hashlib
import inspect
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from pydoc_data import topics

DOCSTRING_CHARACTERS = 10_000_000
_PACKAGE_CHARACTERS = 1_500_000
"""The most that one package may give, so that no package dominates the corpus."""
_SMALLEST_DOCSTRING = 200
_PYTHON_LICENCE = "PSF-2.0"
# pydoc_data would bring the prose twice; encodings are tables; ensurepip and site-packages are other people's.
_NOT_LIBRARY = {"site-packages", "dist-packages", "ensurepip", "pydoc_data", "encodings", "__pycache__"}
# A string after a line that ends with a colon is taken for a docstring. This is far faster than `ast` on a whole
# environment; the few errors do not matter here.
_DOCSTRING = re.compile(r':\n[ \t]+[rR]?"""(.*?)"""', re.DOTALL)


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
    """Python's help topics, then docstrings of installed packages."""
    for name, text in sorted(topics.topics.items()):
        yield Document(path=f"pydoc/{name}", text=text, licence=_PYTHON_LICENCE)
    yield from package_docstrings(Path(sysconfig.get_paths()["purelib"]))


def package_docstrings(site_packages: Path) -> Iterator[Document]:
    """The longer docstrings of installed packages, one document a file, about DOCSTRING_CHARACTERS in all.

    Files come in the order of their names' hashes: a fair sample, the same every time.
    """
    files = {path.relative_to(site_packages): path for path in site_packages.rglob("*.py")}
    distributions = metadata.packages_distributions()
    used: Counter[str] = Counter()
    licences: dict[str, str] = {}
    for name in sorted(files, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest()):
        package = name.parts[0].removesuffix(".py")
        source = _decoded(files[name]) if used[package] < _PACKAGE_CHARACTERS else None
        docstrings = (inspect.cleandoc(found) for found in _DOCSTRING.findall(source or ""))
        text = "\n\n".join(docstring for docstring in docstrings if len(docstring) >= _SMALLEST_DOCSTRING)
        if text:
            if not used[package]:
                licences[package] = _licence(package, distributions)
            used[package] += len(text)
            yield Document(path=f"packages/{name.as_posix()}", text=text, licence=licences[package])
        if used.total() >= DOCSTRING_CHARACTERS:
            return


def _licence(package: str, distributions: Mapping[str, list[str]]) -> str:
    """What the package's metadata says, in one line; "unknown" where it says nothing."""
    names = distributions.get(package)
    if not names:
        return "unknown"
    facts = metadata.metadata(names[0])
    stated = [facts[key] for key in ("License-Expression", "License") if key in facts and facts[key].strip()]
    return stated[0].strip().splitlines()[0] if stated else "unknown"


def _decoded(path: Path) -> str | None:
    """A file as UTF-8 text; None when it is not."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
