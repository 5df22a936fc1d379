"""PassedOver: samples of a run's order that it does not read, because steps that read them went wrong.

    samples of the order   0 ........ 39 | 40 .... 71 | 72 ...
                           read          | a window   | read by the steps after 39
    consumed samples       0 ........ 39              | 40 ...

The n-th sample of a run stays a pure function of (seed, n). What changes is which n a step reads: steps count the
samples that they consumed, and `position` says where in the order they are.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gpt4moe.config.typed import FieldError, from_plain, sealed, unsealed
from gpt4moe.errors import DataError

GONE_BACK_FILE = "gone_back.json"
"""Of a run folder: {"sha256": its seal, "passed_over": as_lists, "times": [GoingBack]} (training.gone_back)."""


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
        """Of as_lists. Raises: FieldError for what are no windows."""
        end = 0
        for window in lists:
            if len(window) != 2 or window[0] < end or window[1] < 1:
                raise FieldError(
                    f"passed_over has {ascii(window)[:60]}, not (first sample, samples) after those before"
                )
            end = sum(window)
        return cls(tuple((first, samples) for first, samples in lists))


NOTHING = PassedOver()


@dataclass(frozen=True, kw_only=True, slots=True)
class GoingBack:
    """One time that a run went back."""

    step: int
    """The one that went wrong."""
    to_step: int
    newest: int
    """Step of the newest healthy checkpoint."""
    samples: int
    """How many are passed over."""
    cause: str
    time: float
    """Seconds since 1970."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    passed_over: list[list[int]]
    times: list[GoingBack]


def gone_back_text(passed_over: PassedOver, times: list[GoingBack]) -> str:
    """The content of GONE_BACK_FILE, sealed: one changed digit would make other checkpoints count."""
    record = _Record(passed_over=passed_over.as_lists(), times=times)
    return sealed(json.dumps(asdict(record), indent=1))


def read_gone_back(run_folder: Path) -> tuple[PassedOver, list[GoingBack]] | None:
    """What a run has passed over, and each time that it went back; None: it never did.

    Raises: DataError when the file is damaged: a run must not read again what it went back from.
    """
    path = run_folder / GONE_BACK_FILE
    try:
        body = unsealed(path.read_bytes().decode(errors="replace"))
        if body is None:
            raise FieldError("its sha256 differs")
        found = from_plain(_Record, json.loads(body))
        wrong = next((time for time in found.times if not time.to_step <= time.newest < time.step), None)
        if wrong is not None:
            raise FieldError(f"from step {wrong.step} it went back to {wrong.to_step}, of {wrong.newest}")
        return PassedOver.of(found.passed_over), found.times
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is damaged, or cannot be read: {error}.",
            "Restore it from a copy. manifest.json of the newest checkpoint has its passed_over, if it was saved after "
            "the run went back.",
        ) from error
