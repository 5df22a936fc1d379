"""Lines of steps: torn ones and those of steps that are done again are dropped, the rest stays."""

from pathlib import Path

import pytest

from gpt4moe.runlog import step_lines
from gpt4moe.runlog.step_lines import StepLines, read_step_lines


def test_a_resume_drops_later_steps_and_torn_lines_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    log = StepLines.open(path, 0)
    assert not path.exists()
    log.add([{"step": 2, "prompt": "a"}, {"step": 2, "prompt": "ü\n"}])
    log.add([{"step": 4, "prompt": "a"}])
    with path.open("ab") as file:
        file.write(b'[1]\n{"step": 4, "pro')
    again = StepLines.open(path, 2)
    assert [line["prompt"] for line in again.resumed] == ["a", "ü\n"]
    again.add([{"step": 4, "prompt": "b"}])
    assert [(line["step"], line["prompt"]) for line in read_step_lines(path)] == [(2, "a"), (2, "ü\n"), (4, "b")]
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("resume_step", [0, 1, 2, 3, 5, 6, 9])
@pytest.mark.parametrize("tail", ["", "\n", '\n{"step": 9}', '\n{"step": 7, "te', "\n\n[1]\n"])
@pytest.mark.parametrize("read_bytes", [1, 7, 1 << 16])
def test_what_is_kept_is_every_whole_line_up_to_the_resume_step(
    resume_step: int, tail: str, read_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_lines, "_READ_BYTES", read_bytes)
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(f'{{"step": {step}, "text": "{step * "é"}"}}' for step in (1, 2, 2, 5, 6)) + tail)
    wanted = [line for line in read_step_lines(path) if line["step"] <= resume_step]
    log = StepLines.open(path, resume_step)
    assert log.resumed == [line for line in wanted if line["step"] == resume_step]
    assert read_step_lines(path) == wanted
    log.add([{"step": 10}])
    assert read_step_lines(path) == [*wanted, {"step": 10}]


def test_a_long_record_is_not_read_to_find_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, decoded = tmp_path / "samples.jsonl", []
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 2001)))
    monkeypatch.setattr(
        step_lines, "_decoded", lambda line, read=step_lines._decoded: decoded.append(line) or read(line)
    )
    StepLines.open(path, 1990)
    assert len(decoded) == len(["the end"]) + 12 and path.read_bytes().endswith(b'{"step": 1990}\n')
