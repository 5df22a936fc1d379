"""Documents that share n words in a row with an evaluation file are removed, and listed.

Words are runs of letters, digits and _, in lower case; 13 of them by default, as GPT-3 (arXiv:2005.14165, appendix C)
does. An evaluation file is jsonl, each string in it a text, or plain text, each line one. A text of fewer than n words
has no run of n, and finds nothing.

    document --words--> those that are the longest of some run --look up--> the whole run, by hash
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from gpt4moe.errors import DataError

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Match:
    evaluation: str
    """file:line"""
    words: str


class Decontamination:
    """
    Args:
        n: words in a row.
    Raises: DataError for a file that is missing, is no text, or has no run of n words.
    """

    def __init__(self, paths: Sequence[Path], n: int):
        self.n, self.places = n, list[str]()
        self.runs: dict[int, int] = {}
        """Hash of a run, index of its place."""
        self.anchors: dict[str, tuple[int, ...]] = {}
        """The longest word of a run, and where in a run it stands."""
        for path in paths:
            before = len(self.runs)
            for place, text in _texts(path):
                self._add(place, text)
            if len(self.runs) == before:
                raise DataError(
                    f"{path} has no run of {n} words that another file has not: nothing could be found with it.",
                    "Name a file of evaluation texts, or lower --decontaminate-words.",
                )

    def find(self, text: str) -> Match | None:
        """The first run of n words that an evaluation file has too."""
        words = _WORD.findall(text.lower())
        if self.anchors.keys().isdisjoint(words):
            return None
        for at, word in enumerate(words):
            for offset in self.anchors.get(word, ()):
                start = at - offset
                if start >= 0 and start + self.n <= len(words):
                    run = " ".join(words[start : start + self.n])
                    place = self.runs.get(_hash(run))
                    if place is not None:
                        return Match(self.places[place], run)
        return None

    def _add(self, place: str, text: str) -> None:
        words = _WORD.findall(text.lower())
        for start in range(len(words) - self.n + 1):
            run = words[start : start + self.n]
            if not self.places or self.places[-1] != place:
                self.places.append(place)
            self.runs.setdefault(_hash(" ".join(run)), len(self.places) - 1)
            offset = max(range(self.n), key=lambda i: len(run[i]))
            known = self.anchors.get(run[offset], ())
            if offset not in known:
                self.anchors[run[offset]] = (*known, offset)


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        raise DataError(f"The evaluation file {path} is missing.", "Name a jsonl or text file.")
    is_json = path.suffix in (".jsonl", ".ndjson", ".json")
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                place = f"{path}:{number}"
                if is_json and line.strip():
                    yield from ((place, text) for text in _strings(json.loads(line)))
                elif line.strip():
                    yield place, line
    except UnicodeDecodeError as error:
        raise DataError(f"The evaluation file {path} is not UTF-8.", "iconv -f LATIN1 -t UTF-8 FILE > NEW") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is no line of JSON ({error}).", "Name it .txt if it is plain text.") from error


def _hash(run: str) -> int:
    return xxhash.xxh3_64_intdigest(run.encode())


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
