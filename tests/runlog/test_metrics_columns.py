"""Columns hold what the records of the same file hold, in eight bytes a value, one record in memory at a time."""

import json
import math
import tracemalloc
from pathlib import Path

import pytest

from gpt4moe.errors import LaunchError
from gpt4moe.runlog.metrics_columns import MetricColumns
from gpt4moe.runlog.metrics_log import decode_record, encode_record, read_metrics

FILES = {
    "absent": None,
    "empty": b"",
    "torn": b'{"step": 1, "loss": 2.0}\n{"step": 2, "los',
    "one line, and a value that is no number": b'{"step": 1, "loss": null}\n',
    "some metrics on some steps": b"".join(
        encode_record({"step": step, "loss": 9.0 / step, **({"eval_loss": 1.0} if step % 3 == 0 else {})})
        for step in range(1, 11)
    ),
    "no numbers": encode_record({"step": 1, "loss": math.nan, "grad_norm": math.inf}) + b'{"step": 2, "loss": 1}\n',
    "a step twice, with other metrics": b'{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 3}\n'
    b'{"step": 2, "mfu": 0.5}\n{"step": 3, "loss": 33}\n',
    "another system's line ends": b'{"step": 1, "loss": 1.5}\r\n{"step": 2, "loss": 2.5}\r{"step": 3}\n',
    "NaN of another writer, and a great integer": b'{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1%s}\n' % (b"0" * 30),
}


@pytest.mark.parametrize("name", FILES)
def test_columns_are_the_columns_of_the_records(name: str, tmp_path: Path) -> None:
    path, content = tmp_path / "metrics.jsonl", FILES[name]
    if content is not None:
        path.write_bytes(content)
    records, columns = read_metrics(path), MetricColumns.read(path)
    assert len(columns) == len(records)
    assert set(columns.names) == {name for record in records for name in record}
    for metric in [*columns.names, "lacking"]:
        pairs = [(record["step"], record[metric]) for record in records if metric in record]
        steps, values = columns.column(metric)
        assert repr(list(zip(steps.tolist(), values.tolist(), strict=True))) == repr(
            [(float(s), float(v)) for s, v in pairs]
        )
        assert repr(columns.last(metric)) == repr(float(pairs[-1][1]) if pairs else None)
        assert [it["step"] for it in columns.records_of(metric)] == [step for step, _ in pairs]


@pytest.mark.parametrize(
    "line", [b"oops", b'{"step": 1, "loss": null}', b'{"step": 1, "loss": true}', b'{"loss": 1.0}']
)
def test_a_damaged_line_is_refused_as_by_read_metrics(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + b'\n{"step": 2}\n')
    with pytest.raises(LaunchError, match="line 1 is not a metrics record") as by_columns:
        MetricColumns.read(path)
    with pytest.raises(LaunchError) as by_records:
        read_metrics(path)
    assert str(by_columns.value) == str(by_records.value)


def test_a_whole_number_beyond_a_float_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1' + "0" * 400 + "}\n")
    with pytest.raises(LaunchError, match="too large for a float"):
        MetricColumns.read(path)


def test_a_run_is_held_in_eight_bytes_a_value(tmp_path: Path) -> None:
    path, steps, metrics = tmp_path / "metrics.jsonl", 3000, 40
    path.write_text(
        "".join(
            json.dumps({"step": step} | {f"m{k}": step / 7 + k for k in range(metrics)}) + "\n"
            for step in range(1, steps + 1)
        )
    )
    tracemalloc.start()
    try:
        columns = MetricColumns.read(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(columns) == steps
    # A growing array may be held twice while it moves; as records it is over 30 bytes a value, as text 20.
    assert peak < 2.5 * 8 * steps * (metrics + 1)


def test_a_float_comes_back_with_the_same_bits() -> None:
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, 2.2250738585072011e-308, -0.0, 123456789.123456789]
    back = [decode_record(encode_record({"step": 1, "loss": value})) for value in values]
    assert [it["loss"].hex() for it in back if it is not None] == [value.hex() for value in values]
