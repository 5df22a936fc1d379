"""File and line of each conversation of a source, so that an error names what a person can mend.

SPLIT-origins.json   [first conversation, file, its line] wherever lines do not go on one by one: once for a plain file

Not in the manifest: no sample depends on it, and a source without it is read as well.
"""

import json
from bisect import bisect_right
from pathlib import Path


class Origins:
    """Of the conversations of a split, as they are written."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, str, int]] = []
        self.count = 0

    def add(self, file: str, line: int) -> None:
        """Of the next conversation."""
        if not self.runs or (file, line - self.count) != (self.runs[-1][1], self.runs[-1][2] - self.runs[-1][0]):
            self.runs.append((self.count, file, line))
        self.count += 1

    def write(self, folder: Path, split: str) -> None:
        _file(folder, split).write_text(json.dumps(self.runs) + "\n", encoding="utf-8")


def line_of(folder: Path, split: str, conversation: int) -> str | None:
    """FILE:LINE of a conversation by its number in a split; None: its source does not say."""
    try:
        runs = json.loads(_file(folder, split).read_text(encoding="utf-8"))
        first, file, line = runs[bisect_right([run[0] for run in runs], conversation) - 1]
    except (OSError, ValueError, IndexError, TypeError):
        return None
    return f"{file}:{line + conversation - first}"


def _file(folder: Path, split: str) -> Path:
    return folder / f"{split}-origins.json"
