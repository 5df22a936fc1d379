"""A metrics.jsonl read fast, for a list of runs: the last steps whole, of earlier ones the number and the seconds.

    each line as MetricsLog writes it, the next step each  -->  step and seconds by their place in it
    one line of another form, or a step missing or twice   -->  read_metrics, which decodes all lines

So a wrong value in the middle of a long file is found by `read_metrics`, which each launch and report calls, and not
here.
"""

from collections import deque
from pathlib import Path

from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.metrics_log import decode_numbers, decode_record, read_metrics

WHOLE_STEPS = 50
_FIRST, _SECONDS = b'{"step": ', b'"step_seconds": '
_CHUNK_BYTES = 1 << 16
"""Larger blocks of memory come from the kernel each time, and each page of them by a fault: three times as slow."""
_SHIFT_BYTES = 64
"""By which a value lies elsewhere than in the line before, where the numbers before it have other lengths."""


def glance_at_metrics(path: Path) -> list[Record]:
    """Records by step: the last WHOLE_STEPS and the first one whole, the others with step and step_seconds alone.

    Raises: LaunchError as `read_metrics` does, for what it sees.
    """
    try:
        lines = _PlainLines(path)
        first, *tail = [decode_record(line) for line in (lines.first, *lines.last)]
        if lines.has_plain_end and first is not None and all(tail):
            early = [{"step": first["step"] + number, "step_seconds": it} for number, it in enumerate(lines.seconds())]
            return [*[first, *early[1:]][: len(early) - len(tail)], *(record for record in tail if record)]
    except (OSError, ValueError):
        pass
    return read_metrics(path)


class _PlainLines:
    """The lines of a file whose steps follow one on the other. Raises: OSError; ValueError for any other line."""

    def __init__(self, path: Path):
        self.first = self.rest = b""
        self.last: deque[bytes] = deque(maxlen=WHOLE_STEPS)
        self._seconds: list[bytes] = []
        self._step = self._shift = 0
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                lines = self.rest + chunk
                end = lines.rfind(b"\n") + 1
                if not lines.isascii() or b"\0" in lines or b"\r" in lines:
                    raise ValueError
                if not self.first and end:
                    self.first = lines[: lines.find(b"\n") + 1]
                    self._step = int(self.first[len(_FIRST) : self.first.find(b",")])
                self._take(lines, end)
                self.rest = lines[end:]

    def _take(self, lines: bytes, size: int) -> None:
        find, starts, keep, add = lines.find, lines.startswith, self.last.append, self._seconds.append
        at, step, shift = 0, self._step, self._shift
        while at < size:
            end = find(b"\n", at)
            place = find(_SECONDS, at + shift, end)
            if place < 0:
                place, shift = find(_SECONDS, at, end), 0
            # Two lines glued have two braces, and so has one with "nonfinite".
            if place < 0 or not starts(b'{"step": %d, ' % step, at) or find(b"{", at + 1, end) >= 0:
                raise ValueError
            begin, comma = place + len(_SECONDS), find(b",", place, end)
            add(lines[begin : comma if comma > 0 else end - 1])
            keep(lines[at : end + 1])
            shift = shift or max(0, place - at - _SHIFT_BYTES)
            at, step = end + 1, step + 1
        self._step, self._shift = step, shift

    @property
    def has_plain_end(self) -> bool:
        """Nothing stands behind the last whole line but what a kill has torn."""
        return not self.rest or decode_record(self.rest) is None

    def seconds(self) -> list[float]:
        """Of each step. Raises: ValueError when one is no number."""
        return decode_numbers(self._seconds)
