"""samples.jsonl and evaluations.jsonl: what a run's model was asked between its steps, a line for each question.

    open(resume_step) -> drop a torn line and steps that will be redone -> add(lines of a step) ...

A line is a JSON object with its `step`; steps ascend. metrics.jsonl has numbers alone, and one line for each step.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

logger = logging.getLogger(__name__)

SAMPLES_FILE = "samples.jsonl"
"""{"step", "prompt", "text", "tokens", "logprobs", "finish_reason"}: texts of training.sample_prompts."""
EVALUATIONS_FILE = "evaluations.jsonl"
"""{"step", "task", "kind", ...}: results of training.evaluate_tasks."""

StepLine = dict[str, Any]
_READ_BYTES = 1 << 16


def read_step_lines(path: Path) -> list[StepLine]:
    """The lines, in order, without those that a kill or a full disk has torn. An absent file gives an empty list."""
    if not path.exists():
        return []
    found = [_decoded(line) for line in path.read_bytes().split(b"\n") if line]
    whole = [line for line in found if line is not None]
    if len(whole) < len(found):
        logger.warning("%s: %d lines are no whole ones", path, len(found) - len(whole))
    return whole


def _decoded(line: bytes) -> StepLine | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and type(found.get("step")) is int else None


class StepLines:
    """The open file of one launch, on its logging rank. The run folder's lock guards it."""

    def __init__(self, path: Path, resumed: list[StepLine]):
        """Use `open`."""
        self.path = path
        self.resumed = resumed
        """The lines of the resume step."""

    @classmethod
    def open(cls, path: Path, resume_step: int) -> Self:
        """Ready for step `resume_step` + 1: lines of later steps, which will be made again, are dropped.

        Reads the file from its end, as far as these steps: a long run's record has gigabytes. Raises: OSError.
        """
        if not path.exists():
            return cls(path, [])
        resumed: list[StepLine] = []
        end = 0
        with path.open("r+b") as file:
            for begin, text in _from_end(file):
                line = _decoded(text)
                if line is None or line["step"] > resume_step:
                    continue
                end = end or begin + len(text) + 1
                if line["step"] < resume_step:
                    break
                resumed.append(line)
            if file.seek(0, os.SEEK_END) != end:
                file.truncate(max(0, end - 1))
                file.seek(0, os.SEEK_END)
                file.write(b"\n" if end else b"")  # which the last line may not have had
                file.flush()
                os.fsync(file.fileno())
        return cls(path, resumed[::-1])

    def add(self, lines: Sequence[StepLine]) -> None:
        """Appends lines and brings them to the disk. Raises: OSError."""
        data = b"".join(map(_encoded, lines))
        # One write call: a kill leaves whole lines, and at most one torn at the end.
        with self.path.open("ab", buffering=0) as file:
            if file.write(data) < len(data):
                raise OSError("the lines were not written whole; is the disk full?")
            os.fsync(file.fileno())


def _from_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Where each line begins, and the line, from the last to the first."""
    at, rest = file.seek(0, os.SEEK_END), b""
    while at:
        size = min(_READ_BYTES, at)
        at -= size
        file.seek(at)
        rest, *lines = (file.read(size) + rest).split(b"\n")
        begin = at + len(rest) + 1 + sum(len(line) + 1 for line in lines)
        for line in reversed(lines):
            begin -= len(line) + 1
            yield begin, line
    yield 0, rest


def _encoded(line: StepLine) -> bytes:
    return json.dumps(line).encode() + b"\n"
