"""A metrics.jsonl read fast, for a list of runs: the last steps whole, of earlier ones the number and the seconds.

Of a line as MetricsLog writes it these two are found by their place; a line of any other form is decoded whole, as are
those with a NUL or a second brace. So a wrong value in the middle of a long file is found by `read_metrics`, which each
launch and report calls, and not here.
"""

from collections import deque
from itertools import pairwise
from pathlib import Path

from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.metrics_log import decode_record, lines_of, read_metrics, whole_records

WHOLE_STEPS = 50
_FIRST, _SECONDS = b'{"step": ', b'"step_seconds": '


def glance_at_metrics(path: Path) -> list[Record]:
    """Records by step: the last WHOLE_STEPS and the first one whole, the others with step and step_seconds alone.

    Raises: LaunchError as `read_metrics` does, for what it sees.
    """
    records: list[Record] = []
    last_lines: deque[bytes] = deque(maxlen=WHOLE_STEPS)
    for record, line in whole_records(lines_of(path), path, _glanced):
        records.append(record if records else decode_record(line) or {})
        last_lines.append(line)
    tail = [decode_record(line) or {} for line in last_lines]
    is_plain = all(record for record in [*records[:1], *tail])
    if not is_plain or any(after["step"] <= before["step"] for before, after in pairwise(records)):
        return read_metrics(path)
    records[len(records) - len(tail) :] = tail
    return records


def _glanced(line: bytes) -> Record | None:
    """As decode_record."""
    at = line.find(_SECONDS)
    is_whole = line.startswith(_FIRST) and line.endswith(b"}\n") and line.isascii() and b"\0" not in line
    # Two lines glued have two braces, and one with "nonfinite".
    if at > 0 and is_whole and line.count(b"{") == 1:
        step, seconds = line[len(_FIRST) : line.find(b",")], line[at + len(_SECONDS) : line.find(b",", at)]
        if step.isdigit() and step != b"0":
            try:
                return {"step": int(step), "step_seconds": float(seconds)}
            except ValueError:
                pass
    return decode_record(line)
