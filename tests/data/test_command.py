"""tools/mixture.py: what a run reads, and bad input refused with a cause."""

from pathlib import Path

import pytest

from tests.data.mixture_tool import RUN, answer
from tools.mixture import main


def test_show_counts_what_the_run_reads(in_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "show", *RUN, f"data.path={in_shards}")
    assert found["samples"] == 3 * 16
    assert found["disk_bytes"] == sum(path.stat().st_size for path in in_shards.rglob("*.bin"))
    assert not found["is_planned"]
    assert main(["show", *RUN, f"data.path={in_shards}"]) == 0
    shown = capsys.readouterr().out
    assert "alpha" in shown
    assert "█" in shown


def test_a_ramp_is_shown_and_says_which_samples_a_step_reads(
    in_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ramp = [*RUN, f"data.path={in_shards}", "training.batch_ramp=[{global_batch_size: 4, until_samples: 7}]"]
    found = answer(capsys, "show", *ramp)
    assert found["samples"] == 4 + 4 + 16
    assert [(span["first_sample"], span["steps"]) for span in found["batches"]] == [(0, 2), (8, 1)]
    assert main(["show", *ramp]) == 0
    assert "from step 3, sample 8: 16 sequences of 16 tokens a step, 1 steps" in capsys.readouterr().out
    step = answer(capsys, "step", "3", *ramp)
    assert (step["first_sample"], step["last_sample"], step["samples"]) == (8, 23, 16)


def test_show_refuses_held_out_shares_of_a_source_that_is_not_there(
    in_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", *RUN, f"data.path={in_shards}", "+data.validation.gamma=1"]) == 2
    assert "data.validation.gamma is not in the data folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["guess"], "is no command"),
        (["sample", "+experiment=tiny"], "wants a number"),
        (["sample", "-1", "+experiment=tiny"], "wants a number"),
        (["sample", "1", "+experiment=tiny", "data=mock"], "no files"),
        (["show", "+experiment=tiny", "data=mock"], "synthetic"),
        (["step", "0", "+experiment=tiny"], "a number from 1"),
        (["verify"], "wants data folders"),
        (["verify", "nowhere"], "does not exist"),
        (["register", "x", "--tokenizer=t.json", "--source=a=b", "--valid=c=d"], "one source at a time"),
        (["register", "x", "--tokenizer=t.json", "--source=a=b", "--valid=a=d"], "t.json is missing"),
    ],
)
def test_bad_input_has_a_cause_and_exit_2(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert words in " ".join(shown.split())
    assert shown.count("fix:") == 1


def test_a_step_and_a_sample_beyond_the_end_are_told_so(in_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [*RUN, f"data.path={in_shards}"]  # 3 steps of 16
    for command, last in (("step", 3), ("sample", 47)):
        for number in (last, last + 1):
            assert answer(capsys, command, str(number), *run)["is_beyond_end"] == (number > last)
    assert main(["step", "4", *run]) == 0
    assert "training.steps=3 ends before" in capsys.readouterr().out


def test_what_verify_finds_has_a_cure(in_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = in_shards / "beta" / "train-00001.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert main(["verify", str(in_shards)]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert "train-00001.bin is damaged" in shown[0] and shown[-1].startswith("fix: beta: Restore the file")
