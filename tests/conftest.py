"""What every test starts from: one thread a process, nothing sent anywhere, and in CI no skip that nobody expects."""

import gc
import os
import signal

import pytest

# Processes that tests start inherit what is ignored here: HUP by nohup, INT by a script's background job. Those whose
# signals are tested would go on ignoring them, as they should.
for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

# Before torch is imported anywhere: several ranks share two cores, and wandb must not look for its server.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_BASE_URL", "http://127.0.0.1:9")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# Tests run on CPUs, also where there are GPUs: a GPU takes one rank only, and equality to the last bit is promised for
# CPUs alone. tests/gpu takes the GPUs back from this variable; a worker of pytest-xdist inherits it.
os.environ.setdefault("GPT4MOE_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# How a skip's reason begins -> why it is all right that CI skips it. Any other skip fails CI.
EXPECTED_SKIPS = {
    "no GPU": "CI machines have none; tests/gpu is for one that has",
    "no lm_eval": "600 MB with what it needs, for one test: make test-harness",
    "no peft": "with accelerate, which nothing else here needs, for one test: make test-peft",
    "no trl": "with datasets and pandas, which nothing else here needs, for a second opinion: make test-trl",
    "no triton": "the CPU build of torch comes without; 1 GB on disk for four tests: make test-triton",
}

_SKIPPED = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips", action="store_true", help="an unexpected skip fails the session (as with CI=true)"
    )


def pytest_collection_finish() -> None:
    """Collections during tests pass over what was imported until now, a million objects."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SKIPPED] = []
    config.pluginmanager.register(_SkipWatch(config), "skip-watch")


def unexpected(reason: str) -> bool:
    """Whether a skip of this reason must not happen in CI."""
    return not reason.removeprefix("Skipped: ").startswith(tuple(EXPECTED_SKIPS))


class _SkipWatch:
    """Notes unexpected skips of tests and of whole files; fails the session in the end, with a list."""

    def __init__(self, config: pytest.Config):
        self.skipped = config.stash[_SKIPPED]
        self.strict = config.getoption("--strict-skips") or os.environ.get("CI", "").lower() in ("1", "true")

    def note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.outcome != "skipped" or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if unexpected(reason):
            self.skipped.append(f"{report.nodeid}: {reason}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.note(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.strict and self.skipped and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.strict and self.skipped:
            terminalreporter.section("skips that nobody expects: the run fails (tests/conftest.py lists the expected)")
            for line in self.skipped:
                terminalreporter.write_line(line)
