"""The high-water mark of a wandb run: which steps it has, so that it gets each one once.

    <run folder>/wandb_step.txt: "<last step sent> <last step surely kept> <wandb's folder of this start>"

A step sent is not yet a step kept: wandb's service holds some in memory and drops them when the training process is
killed (wandb 0.31: "forced shutdown"). So only a finished start vouches for what it sent; after any other end, what
wandb has is asked of wandb (wandb_run.py).
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gpt4moe.runlog.atomic_file import replace_file

STEP_FILE = "wandb_step.txt"


@dataclass(slots=True)
class WandbMark:
    """The mark as it stands in its file."""

    file: Path
    sent: int = 0
    kept: int = 0
    """What earlier starts vouch for."""
    start: str = ""
    """Name of wandb's own folder of the last start."""

    @classmethod
    def read(cls, run_folder: Path) -> Self:
        """Raises: OSError, ValueError when the file cannot be read as a mark."""
        file = run_folder / STEP_FILE
        if not file.exists():
            return cls(file)
        words = file.read_text().split()
        if len(words) not in (2, 3):
            raise ValueError(f"{file} is no mark: {words[:4]}")
        return cls(file, int(words[0]), int(words[1]), words[2] if len(words) == 3 else "")

    @property
    def is_sure(self) -> bool:
        return self.sent == self.kept

    def settle(self, kept: int) -> None:
        """What wandb was found to have; nothing beyond it counts as sent."""
        self.sent = self.kept = max(self.kept, min(kept, self.sent))

    def begin(self, start: str) -> None:
        """A start whose wandb folder is `start` begins to send after the last step kept."""
        self.start = start
        replace_file(self.file, f"{self.sent:012d} {self.kept:012d} {start}\n".encode())

    def advance(self, step: int) -> None:
        """`step` is being sent."""
        self.sent = step
        # In place and of one width: cheap enough for every step, and a kill leaves the old number or the new one.
        file = os.open(self.file, os.O_WRONLY)
        try:
            os.pwrite(file, b"%012d" % step, 0)
        finally:
            os.close(file)

    def finish(self) -> None:
        """wandb has ended in order: it has all that was sent."""
        self.kept = self.sent
        self.begin(self.start)
