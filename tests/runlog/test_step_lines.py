"""Lines of steps: torn ones and those of steps that are done again are dropped, the rest stays."""

from pathlib import Path

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
    assert [line["prompt"] for line in again.at(2)] == ["a", "ü\n"] and again.at(4) == []
    again.add([{"step": 4, "prompt": "b"}])
    assert [(line["step"], line["prompt"]) for line in read_step_lines(path)] == [(2, "a"), (2, "ü\n"), (4, "b")]
    assert path.read_bytes().count(b"\n") == 3
