"""What a person sees: a bar on a terminal, few and whole lines in a log, two lines for a mistake."""

import io
from collections.abc import Collection

import pytest

from gpt4moe.runlog.command_line import print_error, run_tool
from gpt4moe.runlog.console import Console, clock_time, short_count


class Clock:
    """Seconds, moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(
    stream: io.StringIO, *, steps: int, seconds_a_step: float, start: int = 0, evaluate: Collection[int] = ()
) -> str:
    clock = Clock()
    console = Console(steps, start, "demo [1]", stream=stream, clock=clock)
    console.start()
    for step in range(start + 1, steps + 1):
        clock.now += seconds_a_step
        record = {"step": step, "loss": 5.0 - step / 1000, "tokens_per_second": 12345.0}
        console.step(record | ({"eval_loss": 4.5} if step in evaluate else {}))
    console.close()
    return stream.getvalue()


def logged_steps(text: str) -> list[int]:
    return [int(line.split()[1].split("/")[0]) for line in text.splitlines() if line.startswith("step ")]


def test_a_log_gets_the_first_the_last_and_a_step_every_few_seconds() -> None:
    assert logged_steps(run(io.StringIO(), steps=100, seconds_a_step=0.25)) == [1, 21, 41, 61, 81, 100]


def test_a_slow_run_logs_every_step() -> None:
    assert logged_steps(run(io.StringIO(), steps=4, seconds_a_step=30.0)) == [1, 2, 3, 4]


def test_an_evaluation_is_logged_at_once() -> None:
    text = run(io.StringIO(), steps=20, seconds_a_step=0.01, evaluate={10})
    assert logged_steps(text) == [1, 10, 20]
    assert "eval 4.5000" in text.splitlines()[2]


def test_a_log_line_has_the_numbers_and_no_control_codes() -> None:
    text = run(io.StringIO(), steps=300, seconds_a_step=1.0)
    assert "\x1b" not in text and "\r" not in text
    line = next(line for line in text.splitlines() if line.startswith("step 101/300"))
    assert line == "step 101/300  loss 4.8990  12.3k tokens/s  eta 0:03:19"


def test_a_resume_says_where_it_goes_on() -> None:
    text = run(io.StringIO(), steps=12, start=10, seconds_a_step=1.0)
    assert text.splitlines()[0] == "demo [1]: resume after step 10, to step 12"
    assert logged_steps(text) == [11, 12]


def test_a_terminal_gets_a_live_bar_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    text = run(Terminal(), steps=20, seconds_a_step=1.0)
    for wanted in ("demo [1]", "20/20", "loss 4.9800", "12.3k tokens/s", "\x1b["):
        assert wanted in text
    assert "\nstep " not in text


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert logged_steps(run(Terminal(), steps=2, seconds_a_step=1.0)) == [1, 2]


def test_forced_colour_puts_no_bar_into_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in run(io.StringIO(), steps=2, seconds_a_step=1.0)


def test_a_message_keeps_brackets_and_long_text_on_one_line() -> None:
    stream = io.StringIO()
    console = Console(2, 0, "demo", stream=stream)
    console.start()
    console.message("checkpoint [bold] " + "x" * 300)
    assert "checkpoint [bold] " + "x" * 300 in stream.getvalue().splitlines()


def test_a_nan_loss_is_shown() -> None:
    stream = io.StringIO()
    console = Console(2, 0, "demo", stream=stream)
    console.start()
    console.step({"step": 1, "loss": float("nan")})
    assert "loss nan" in stream.getvalue()


def test_a_mistake_is_two_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("parallel.tp=3 does not divide [heads]\n = 4 " + "y" * 200, "Set parallel.tp=2.")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "error: parallel.tp=3 does not divide [heads] = 4 " + "y" * 200,
        "fix: Set parallel.tp=2.",
    ]


def test_ctrl_c_ends_a_tool_in_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def act(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    assert run_tool(["x"], None, act) == 130
    assert capsys.readouterr().err.splitlines() == ["error: Stopped by Ctrl-C.", "fix: Run the same command again."]


def test_numbers_are_short() -> None:
    assert [short_count(v) for v in (7.0, 999.4, 999.6, 12345, 1.5e9)] == ["7", "999", "1k", "12.3k", "1.5B"]
    assert [clock_time(s) for s in (0, 59.6, 90061)] == ["0:00:00", "0:01:00", "25:01:01"]
