"""A metrics.jsonl as columns of numbers: 8 bytes a value, where a list of records takes over 100.

    lines, one at a time -> the table of the record's keys, a row each -> one column of all tables, by step

A run has few sets of keys (steps that evaluate have more), so there are few tables, and a row is packed in one call.
That call checks the values too: it takes numbers alone.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct
from struct import error as StructError
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gpt4moe.errors import LaunchError
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.metrics_log import decode_record, lines_of, unchecked_record, whole_records


@dataclass(slots=True)
class _Table:
    """The records that have the same keys in the same order."""

    keys: tuple[str, ...]
    row: Struct
    numbers: bytearray = field(default_factory=bytearray)
    """Rows of float64. An integer below 2^53 is exact."""
    lines: list[int] = field(default_factory=list)
    """Of each row which record of the file it is."""

    def rows(self) -> NDArray[np.float64]:
        """[rows, keys]"""
        return np.frombuffer(self.numbers, dtype=np.float64).reshape(-1, len(self.keys))


class _Tables:
    """Records as they come, in the tables of their keys."""

    def __init__(self) -> None:
        self.by_keys: dict[tuple[str, ...], _Table] = {}
        self._last = _Table((), Struct(""))
        """That of the record before: most have its keys, and a tuple's hash is not kept."""
        self._taken = 0

    def add(self, record: Record) -> None:
        """Raises: StructError, OverflowError for a value that is no number, or too large for a float."""
        keys = tuple(record)
        table = self._last
        if keys != table.keys:
            table = self._last = self.by_keys.setdefault(keys, _Table(keys, Struct(f"{len(keys)}d")))
        table.numbers += table.row.pack(*record.values())
        table.lines.append(self._taken)
        self._taken += 1

    def take(self, line: bytes) -> Record | None:
        """Adds the record of a line; None when the line is not a whole one. Raises: as `add`, for a number too large.

        Checking each value's type would take as long as reading it.
        """
        # Packing takes these two words of JSON as 1 and 0.
        record = decode_record(line) if b"true" in line or b"false" in line else unchecked_record(line)
        if record is not None:
            try:
                self.add(record)
            except (StructError, OverflowError):
                if decode_record(line) is None:
                    return None
                raise
        return record


class MetricColumns:
    """The metrics of a run, by name. Of one step written twice the later counts, as in `read_metrics`."""

    def __init__(self, records: Iterable[Record]):
        tables = _Tables()
        for record in records:
            tables.add(record)
        self._tables = _rows_that_count(tables)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Of a metrics.jsonl. An absent file gives no steps. Raises: LaunchError as `read_metrics` does, and for a
        whole number beyond float64."""
        tables = _Tables()
        try:
            deque(whole_records(lines_of(path), path, tables.take), maxlen=0)
        except (OverflowError, StructError) as error:
            raise LaunchError(
                f"{path} has a whole number that is too large for a float.",
                "Restore the file from a copy, or move it away: the log then begins at the checkpoint's next step.",
            ) from error
        columns = cls(())
        columns._tables = _rows_that_count(tables)
        return columns

    def __len__(self) -> int:
        """Steps."""
        return sum(len(rows) for _, rows in self._tables)

    @property
    def names(self) -> list[str]:
        """Every metric that any step has, in the order in which they came."""
        return list(dict.fromkeys(name for keys, _ in self._tables for name in keys))

    def column(self, name: str, *, x: str = "step") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(x, values) of the steps that have both, by step; a value may be no number."""
        parts = [
            (rows[:, keys.index("step")], rows[:, keys.index(x)], rows[:, keys.index(name)])
            for keys, rows in self._tables
            if name in keys and x in keys
        ]
        if not parts:
            return np.empty(0), np.empty(0)
        step, along, values = (np.concatenate(each) for each in zip(*parts, strict=True))
        order = np.argsort(step, kind="stable")
        return along[order], values[order]

    def last(self, name: str) -> float | None:
        """The metric's last value; None where no step has it."""
        _, values = self.column(name)
        return float(values[-1]) if len(values) else None

    def records_of(self, name: str) -> Iterator[Record]:
        """Records that have this metric and their step alone."""
        steps, values = self.column(name)
        for step, value in zip(steps.astype(np.int64).tolist(), values.tolist(), strict=True):
            yield {"step": step, name: value}


def _rows_that_count(tables: _Tables) -> list[tuple[tuple[str, ...], NDArray[np.float64]]]:
    """Keys and rows of each table that has any."""
    filled = [table for table in tables.by_keys.values() if table.lines]  # a line that is not whole may leave one empty
    return [(table.keys, rows) for table, rows in _each_step_once(filled)]


def _each_step_once(tables: list[_Table]) -> Iterator[tuple[_Table, NDArray[np.float64]]]:
    """Each table with the rows that count."""
    if not tables:
        return
    rows = [table.rows() for table in tables]
    steps = np.concatenate([each[:, table.keys.index("step")] for table, each in zip(tables, rows, strict=True)])
    lines = np.concatenate([table.lines for table in tables])
    by_step = np.lexsort((lines, steps))
    is_last = np.append(np.diff(steps[by_step]) != 0, True)
    counts = np.zeros(len(steps), dtype=np.bool_)
    counts[by_step[is_last]] = True
    ends = np.cumsum([len(each) for each in rows])
    for table, each, own in zip(tables, rows, np.split(counts, ends[:-1]), strict=True):
        if own.any():
            yield table, each if own.all() else each[own]
