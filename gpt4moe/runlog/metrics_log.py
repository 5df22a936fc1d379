"""metrics.jsonl: one JSON object for each step, and each step exactly once, after kills and restarts too.

    open(resume_step) -> cut off a torn line, drop steps that will be redone -> write(last step + 1) ... -> sync()

A float is written as Python's shortest repr, so reading gives the same bits. NaN and infinity are not JSON: the value
becomes null, and `nonfinite` has what it was (`"loss": null, "nonfinite": {"loss": "nan"}`). So a column is numbers or
null for pandas and jq, and read_metrics gives the float back.
"""

import errno
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import orjson

from gpt4moe.errors import LaunchError
from gpt4moe.runlog.metrics import Number, Record
from gpt4moe.runlog.metrics_table import check_record
from gpt4moe.runlog.run_files import replace_file

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
NONFINITE = "nonfinite"


def encode_record(record: Mapping[str, Number]) -> bytes:
    """One line, newline included."""
    nonfinite = {name: str(value) for name, value in record.items() if not math.isfinite(value)}
    line: dict[str, object] = {name: None if name in nonfinite else value for name, value in record.items()}
    if nonfinite:
        line[NONFINITE] = nonfinite
    return json.dumps(line, allow_nan=False).encode() + b"\n"


def decode_record(line: bytes) -> Record | None:
    """The record of one line; None when the line is not a whole one."""
    record = unchecked_record(line)
    return record if record is not None and set(map(type, record.values())) <= {int, float} else None


def unchecked_record(line: bytes) -> Record | None:
    """As `decode_record`, but a value may be of another type than a number."""
    try:
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            record = json.loads(line)  # it takes NaN and integers of any size
        if NONFINITE in record:
            record.update({name: float(text) for name, text in record.pop(NONFINITE).items()})
        whole: Record | None = record if type(record["step"]) is int and record["step"] >= 1 else None
        return whole
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def decode_numbers(texts: Sequence[bytes]) -> list[float]:
    """Of many values at once. Raises: ValueError when one is no number."""
    numbers = orjson.loads(b"[" + b",".join(texts) + b"]")
    if len(numbers) != len(texts) or not set(map(type, numbers)) <= {int, float}:
        raise ValueError
    return list(map(float, numbers))


def read_metrics(path: Path | str) -> list[Record]:
    """All records by step, without a torn last line. An absent file gives an empty list.

    Raises: LaunchError when a line is damaged that no kill can have torn.
    """
    return StoredMetrics.read(Path(path)).records


@dataclass(frozen=True, slots=True)
class StoredMetrics:
    """The contents of a metrics.jsonl, read once for all callbacks: 100,000 steps take seconds."""

    lines: Sequence[tuple[Record, bytes]] = ()
    """Each record with its line, by step."""
    is_mended: bool = True
    """The file holds these lines and nothing else: no torn line, no step twice."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises: LaunchError when the file is damaged in a way that no kill can cause, or cannot be read."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise _unreadable(path, error) from error
        lines = _decode_lines(data, path)
        return cls(lines, is_mended=b"".join(line for _, line in lines) == data)

    @property
    def records(self) -> list[Record]:
        return [record for record, _ in self.lines]

    def up_to(self, step: int) -> Self:
        """Only the steps up to `step`; later ones will be redone."""
        return type(self)([(record, line) for record, line in self.lines if record["step"] <= step])


def _decode_lines(data: bytes, path: Path) -> list[tuple[Record, bytes]]:
    """Records with their bytes, by step; of one step written twice the later wins."""
    lines = data.splitlines(keepends=True)
    by_step = {record["step"]: (record, line.rstrip(b"\r\n") + b"\n") for record, line in whole_records(lines, path)}
    return [by_step[step] for step in sorted(by_step)]


def whole_records(
    lines: Iterable[bytes], path: Path, decode: Callable[[bytes], Record | None] = decode_record
) -> Iterator[tuple[Record, bytes]]:
    """The records of a metrics.jsonl with their lines, in the file's order; a torn last line is left out.

    Args:
        path: of the file, for errors.
        decode: one line; None: it is not a whole one.
    Raises: LaunchError when a line is damaged that no kill can have torn.
    """
    damaged = None
    for number, line in enumerate(lines, start=1):
        record = decode(line)
        if record is None:
            damaged = damaged or number
        elif damaged:
            raise LaunchError(
                f"{path}: line {damaged} is not a metrics record, yet line {number} after it is.",
                "Restore the file from a copy, or move it away: the log then begins at the checkpoint's next step.",
            )
        else:
            yield record, line


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file, one in memory at a time; none where there is no file.

    Raises: LaunchError when it cannot be read.
    """
    try:
        with path.open("rb", buffering=1 << 18) as file:
            for line in file:
                # As splitlines() does, which splits at \r too.
                yield from line.splitlines(keepends=True) if b"\r" in line else (line,)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> LaunchError:
    return LaunchError(
        f"{path} cannot be read: {error.strerror}.", "Make it a file that you may read, or move it away."
    )


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Turns a disk error into a LaunchError."""
    try:
        yield
    except OSError as error:
        raise LaunchError(
            f"{path} cannot be written: {error.strerror}.",
            "A run keeps every step there. Make room or mend the cause, then start again: it goes on from its last "
            "checkpoint.",
        ) from error


class MetricsLog:
    """The open metrics.jsonl of one run, on its logging rank, from start to exit. The run folder's lock guards it."""

    def __init__(self, path: Path, last_step: int):
        """Use `open`."""
        self.path = path
        self.last_step = last_step
        self._is_refused = False
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    @classmethod
    def open(cls, path: Path | str, resume_step: int = 0, stored: StoredMetrics | None = None) -> Self:
        """The log, ready for step `resume_step` + 1: later steps and a torn last line are dropped.

        Args:
            resume_step: step of the checkpoint that training goes on from; 0 for a new run.
            stored: the contents of the file, where they have been read already.
        Raises: LaunchError when the file is damaged in a way that no kill can cause, or cannot be written.
        """
        path = Path(path)
        stored = stored or StoredMetrics.read(path)
        kept = stored.up_to(resume_step).lines
        if len(kept) < len(stored.lines):
            logger.info("%s: %d steps after %d will be redone", path, len(stored.lines) - len(kept), resume_step)
        if kept and kept[-1][0]["step"] < resume_step:
            logger.warning("%s: steps %d to %d are lost", path, kept[-1][0]["step"] + 1, resume_step)
        with _writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not stored.is_mended or len(kept) < len(stored.lines):
                replace_file(path, b"".join(line for _, line in kept))
            return cls(path, resume_step)

    def write(self, record: Mapping[str, Number]) -> None:
        """Appends one step.

        Raises:
            ValueError: a name that is not in METRICS, or a step that is not the one after the last.
            LaunchError: the line is not wholly in the file (a full disk); the next `open` mends it.
        """
        check_record(record)
        if record["step"] != self.last_step + 1:
            raise ValueError(f"{self.path}: step {record['step']} cannot follow step {self.last_step}")
        line = encode_record(record)
        # One write call: a kill leaves the line whole or torn at the end of the file, never two lines interleaved.
        self._is_refused = True
        with _writable(self.path):
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes fitted")
        self._is_refused = False
        self.last_step += 1

    def sync(self) -> None:
        """Brings the lines to the disk. Call it before a checkpoint is committed: none may be ahead of the log.

        Raises: LaunchError when the disk does not take them; some file systems say so only here.
        """
        with _writable(self.path):
            os.fsync(self._file)

    def close(self) -> None:
        """Brings the lines to the disk and closes, also where it takes none. A second call does nothing.

        Raises: LaunchError when the disk does not take them, unless a write has said so before.
        """
        if self._file >= 0:
            try:
                self.sync()
            except LaunchError:
                if not self._is_refused:
                    raise
            finally:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
