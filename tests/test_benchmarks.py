"""The command lines of benchmarks: nothing is measured for an argument that means nothing."""

import pytest

from benchmarks import gpt4_checkpoint, startup
from benchmarks.harness.command import read_options


@pytest.mark.parametrize("main", [gpt4_checkpoint.main, startup.main])
@pytest.mark.parametrize(("argument", "status"), [("nonsense", 2), ("--shared", 2), ("--help", 0)])
def test_a_benchmark_without_options_refuses_all_but_help(main, argument: str, status: int, capsys) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit) as ended:
        main([argument])
    assert ended.value.code == status
    said = capsys.readouterr()
    assert argument in said.err if status else "python -m benchmarks." in said.out


def test_a_switch_is_true_where_it_was_given() -> None:
    given = [read_options("text", arguments, shared="CPU time") for arguments in ([], ["--shared"])]
    assert [one.shared for one in given] == [False, True]
