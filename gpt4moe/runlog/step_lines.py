"""samples.jsonl and evaluations.jsonl: what a run's model was asked between its steps, a line for each question.

    open(resume_step) -> drop a torn line and steps that will be redone -> add(lines of a step) ...

A line is a JSON object with its `step`. metrics.jsonl has numbers alone, and one line for each step.
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from gpt4moe.runlog.run_files import replace_file

logger = logging.getLogger(__name__)

SAMPLES_FILE = "samples.jsonl"
"""{"step", "prompt", "text", "tokens", "logprobs", "finish_reason"}: texts of training.sample_prompts."""
EVALUATIONS_FILE = "evaluations.jsonl"
"""{"step", "task", "kind", ...}: results of training.evaluate_tasks."""

StepLine = dict[str, Any]


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

    def __init__(self, path: Path, lines: list[StepLine]):
        """Use `open`."""
        self.path = path
        self.lines = lines

    @classmethod
    def open(cls, path: Path, resume_step: int) -> Self:
        """Ready for step `resume_step` + 1: lines of later steps, which will be made again, are dropped.

        Raises: OSError.
        """
        kept = [line for line in read_step_lines(path) if line["step"] <= resume_step]
        data = b"".join(map(_encoded, kept))
        if path.exists() and path.read_bytes() != data:
            replace_file(path, data)
        return cls(path, kept)

    def at(self, step: int) -> list[StepLine]:
        """The lines of a step."""
        return [line for line in self.lines if line["step"] == step]

    def add(self, lines: Sequence[StepLine]) -> None:
        """Appends lines and brings them to the disk. Raises: OSError."""
        data = b"".join(map(_encoded, lines))
        # One write call: a kill leaves whole lines, and at most one torn at the end.
        with self.path.open("ab", buffering=0) as file:
            if file.write(data) < len(data):
                raise OSError("the lines were not written whole; is the disk full?")
            os.fsync(file.fileno())
        self.lines += lines


def _encoded(line: StepLine) -> bytes:
    return json.dumps(line).encode() + b"\n"
