"""Progress of commands that read or write many bytes, where nobody watches a terminal."""

from gpt4moe.data.progress import ProgressLines, byte_bar


def test_a_log_has_a_line_a_minute_with_the_rate_and_the_time_that_is_left() -> None:
    said: list[str] = []
    now = [0.0]
    lines = ProgressLines("web", 10_000_000_000, said.append, lambda: now[0])
    lines.advance(3_000_000_000)  # finished before a restart
    for second in range(1, 151):
        now[0] = second
        lines.advance(20_000_000)
    assert said == [
        "web: 4,200 of 10,000 MB, 70.0 MB/s, 1 min left", "web: 5,400 of 10,000 MB, 20.0 MB/s, 4 min left",
    ]  # fmt: skip


def test_work_that_reads_more_than_was_told_says_no_time_and_short_work_nothing(capfd) -> None:  # type: ignore[no-untyped-def]
    said: list[str] = []
    times = iter([0.0, 60.0])
    ProgressLines("web", 0, said.append, lambda: next(times)).advance(5_000_000)
    assert said == ["web: 5 of 0 MB, 0.1 MB/s"]
    with byte_bar("web", 10) as advance:
        advance(10)
    assert capfd.readouterr().err == ""
