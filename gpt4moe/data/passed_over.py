"""PassedOver: samples of a run's order that it does not read, because steps that read them went wrong.

    samples of the order   0 ........ 39 | 40 .... 71 | 72 ...
                           read          | a window   | read by the steps after 39
    consumed samples       0 ........ 39              | 40 ...

The n-th sample of a run stays a pure function of (seed, n). What changes is which n a step reads: steps count the
samples that they consumed, and `position` says where in the order they are.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt4moe.errors import DataError

GONE_BACK_FILE = "gone_back.json"
"""Of a run folder: {"passed_over": PassedOver.as_lists, "times": [...]} (training.gone_back)."""


@dataclass(frozen=True, slots=True)
class PassedOver:
    """Windows (first sample, samples) of the order, ascending; none touch."""

    windows: tuple[tuple[int, int], ...] = ()

    def position(self, consumed_samples: int) -> int:
        """The sample that follows `consumed_samples` read ones, in the order."""
        for first, samples in self.windows:
            if consumed_samples < first:
                break
            consumed_samples += samples
        return consumed_samples

    def before(self, position: int) -> "PassedOver":
        """The windows that end at or before a position."""
        return PassedOver(tuple(window for window in self.windows if sum(window) <= position))

    def and_from(self, first: int, end: int) -> "PassedOver":
        """The windows before `first`, and [first, end). Later windows lie in it: a run goes back from beyond them."""
        kept = [window for window in self.windows if window[0] < first]
        if kept and sum(kept[-1]) >= first:
            first = kept.pop()[0]
        return PassedOver((*kept, (first, end - first)))

    def as_lists(self) -> list[list[int]]:
        """For JSON."""
        return [list(window) for window in self.windows]

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> "PassedOver":
        """Of as_lists."""
        return cls(tuple((int(first), int(samples)) for first, samples in lists))


NOTHING = PassedOver()


def read_gone_back(run_folder: Path) -> tuple[PassedOver, list[dict[str, Any]]] | None:
    """What a run has passed over, and each time that it went back; None: it never did.

    Raises: DataError when the file is damaged: a run must not read again what it went back from.
    """
    path = run_folder / GONE_BACK_FILE
    try:
        found = json.loads(path.read_bytes())
        return PassedOver.of(found["passed_over"]), [dict(time) for time in found["times"]]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{path} is damaged, or cannot be read.",
            "Restore it from a copy. manifest.json of the newest checkpoint has its passed_over, if it was saved after "
            "the run went back.",
        ) from error
