"""The command: times as Slurm writes them, bad input, JSON alone on stdout, help that teaches."""

import json
from pathlib import Path

import pytest

from gpt4moe.errors import ConfigError
from gpt4moe.launch.command import read, run, seconds_of
from gpt4moe.launch.facts import _job_limit, source_hash
from gpt4moe.parallel.environment import Environment
from tools import preflight as tool

ALONE = Environment.detect({})
GPT4 = ["+experiment=gpt4", "ranks=24960", "time_limit=24:00:00", "--json"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("15", 900), ("90:30", 5430), ("24:00:00", 86400), ("1-12", 129600), ("1-12:30", 131400),
        ("1-00:00:05", 86405), ("UNLIMITED", None), ("", None),
    ],
)  # fmt: skip
def test_time_limits_are_read_as_slurm_writes_them(text: str, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "argument", ["ranks=many", "time_limit=soon", "output=xml", "time_limit=1:2:3:4", "signal=USR1@90"]
)
def test_a_value_that_is_none_is_refused(argument: str) -> None:
    with pytest.raises(ConfigError, match=argument.partition("=")[2]):
        read(["+experiment=tiny", argument])


def test_other_ranks_than_were_started_are_for_one_process_alone() -> None:
    four = Environment(rank=0, world_size=4, local_rank=0, master=("127.0.0.1", 1), source="torchrun")
    with pytest.raises(ConfigError, match="torchrun started 4"):
        run(read(["+experiment=tiny", "ranks=8"]), four)


def test_one_process_judges_the_plan_of_gpt_4_and_says_what_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run(read([*GPT4, f"run.root={tmp_path}"]), ALONE)
    report = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in report["checks"]}
    assert (status, report["fit"]) == (1, False), "no disk here holds four checkpoints of 22 TB"
    assert checks["disk space"]["expected"].endswith("4 checkpoints of 22 TB")
    for name in ("layout", "placement", "first checkpoint"):
        assert checks[name]["status"] == "passed"
    assert checks["device memory"]["status"] == "warned", "it fits, with 4% to spare: 81.3 of 85.0 GB"
    for name in ("ranks", "GPUs", "host memory", "matrix products", "node links", "groups"):
        assert checks[name]["status"] == "not checked"


def test_bad_input_ends_with_2_and_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["+experiment=tiny", "parallel.tpp=2"]) == 2
    cause, cure = capsys.readouterr().err.splitlines()
    assert "tpp" in cause and cure.startswith("fix:")


def test_help_shows_how_to_start_it_alone_under_torchrun_and_in_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("ranks=24960", "torchrun", "slurm/preflight.sh", "exit status"))


def test_memory_that_a_job_may_still_take_is_the_tightest_of_its_control_groups(tmp_path: Path) -> None:
    inner = tmp_path / "fs" / "job" / "step"
    inner.mkdir(parents=True)
    for folder, limit, used in ((inner, "max", "5"), (inner.parent, "1000", "300"), (tmp_path / "fs", "2000", "1600")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(used + "\n")
    groups = tmp_path / "cgroup"
    groups.write_text("0::/job/step\n")
    assert _job_limit(groups, tmp_path / "fs") == 400
    assert _job_limit(tmp_path / "none") == float("inf")


def test_memory_limits_of_the_older_control_groups_count_too(tmp_path: Path) -> None:
    for path, limit, used in (
        ("memory/job", "900", "300"),
        ("memory", str((1 << 63) - 4096), "700"),
        ("cpu/job", "5", "1"),
    ):
        folder = tmp_path / "fs" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(limit + "\n")
        (folder / "memory.usage_in_bytes").write_text(used + "\n")
    groups = tmp_path / "cgroup"
    groups.write_text("9:cpu,cpuacct:/job\n4:memory:/job\n0::/\n")
    assert _job_limit(groups, tmp_path / "fs") == 600


def test_the_source_hash_sees_an_edit_and_not_the_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "layer.py").write_text("x = 1\n")
    before = source_hash(tmp_path / "one")
    assert source_hash(tmp_path / "two") == before
    (tmp_path / "two" / "layer.py").write_text("x = 2\n")
    assert source_hash(tmp_path / "two") != before
