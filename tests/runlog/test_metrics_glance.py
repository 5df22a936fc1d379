"""A glance at metrics.jsonl says what reading every line says, and decodes only the ends of the file."""

import math
import random
from pathlib import Path

import pytest

from gpt4moe.errors import LaunchError
from gpt4moe.runlog import metrics_glance, metrics_log
from gpt4moe.runlog.metrics_glance import WHOLE_STEPS, glance_at_metrics
from gpt4moe.runlog.metrics_log import encode_record, read_metrics


def lines(steps: int) -> list[bytes]:
    rng = random.Random(steps)
    return [
        encode_record({"step": step, "loss": rng.random(), "step_seconds": rng.expovariate(1e-3), "mfu": rng.random()})
        for step in range(1, steps + 1)
    ]


def agrees(path: Path) -> None:
    found, expected = glance_at_metrics(path), read_metrics(path)
    assert [it["step"] for it in found] == [it["step"] for it in expected]
    assert [it.get("step_seconds") for it in found] == [it.get("step_seconds") for it in expected]
    assert repr(found[-WHOLE_STEPS:]) == repr(expected[-WHOLE_STEPS:])


@pytest.mark.parametrize("steps", [0, 1, WHOLE_STEPS, WHOLE_STEPS + 1, 400])
def test_a_glance_agrees_with_every_line(steps: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    agrees(path)
    path.write_bytes(b"".join(lines(steps)))
    agrees(path)


ODD = {
    "no finite number": encode_record({"step": 100, "loss": math.nan, "step_seconds": 2.0}),
    "seconds last": encode_record({"step": 100, "loss": 1.0, "step_seconds": 2.0}),
    "no seconds": encode_record({"step": 100, "loss": 1.0}),
    "another writer": b'{"loss":1,"step_seconds":2.5,"step":100}\n',
    "gone": b"",
    "twice": encode_record({"step": 99, "loss": 1.0, "step_seconds": 7.0, "mfu": 1.0}),
}


@pytest.mark.parametrize("name", ODD)
def test_a_line_of_another_form_is_decoded(name: str, tmp_path: Path) -> None:
    path, every = tmp_path / "metrics.jsonl", lines(200)
    every[99] = ODD[name]
    path.write_bytes(b"".join(every) + b'{"step": 201, "lo')
    agrees(path)


DAMAGED = [
    (0, b'{"step": 1, "loss": "low", "step_seconds": 1.0, "mfu": 1}\n'),
    (99, b"oops\n"),
    (99, lines(100)[-1][:-1] + lines(101)[-1]),
    (99, lines(100)[-1][:-40] + lines(101)[-1]),
    (99, lines(100)[-1].replace(b'"loss": 0.', b'"loss": 0.' + bytes(512))),
    (99, b'{"step": 100, "loss": 1.0, "step_sec\n'),
    (99, b'{"step": 0, "step_seconds": 1.0, "mfu": 1}\n'),
    (99, b'{"step": 100, "step_seconds": x, "mfu": 1}\n'),
    (180, b'{"step": 181, "loss": true, "step_seconds": 1.0, "mfu": 1}\n'),
]


@pytest.mark.parametrize(("at", "line"), DAMAGED)
def test_a_damaged_line_is_refused(at: int, line: bytes, tmp_path: Path) -> None:
    path, every = tmp_path / "metrics.jsonl", lines(200)
    every[at] = line
    path.write_bytes(b"".join(every))
    with pytest.raises(LaunchError, match=f"line {at + 1} is not a metrics record"):
        glance_at_metrics(path)


def test_only_the_ends_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, decoded = tmp_path / "metrics.jsonl", []
    path.write_bytes(b"".join(lines(1000)))

    def counting(line: bytes) -> object:
        decoded.append(line)
        return metrics_log.decode_record(line)

    monkeypatch.setattr(metrics_glance, "decode_record", counting)
    assert len(glance_at_metrics(path)) == 1000
    assert len(decoded) == 1 + WHOLE_STEPS
