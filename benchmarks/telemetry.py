"""The report of a long run and the list of many runs: processor seconds and memory.

    python -m benchmarks.telemetry

Each is measured in a process of its own, which counts its own processor time (`time.process_time`) and its largest
resident set (VmHWM of /proc: that of `resource.getrusage` begins with the parent's). Targets: the report of 100,000
steps takes 2 s without the imports and 200 MB with them, the list of 50 runs of 5,000 steps 1 s with its start.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness.command import read_options
from benchmarks.harness.process import machine
from gpt4moe.moe.statistics import LAYER_METRICS
from gpt4moe.runlog.metrics_log import METRICS_FILE
from gpt4moe.runlog.metrics_table import METRICS

REPORT_STEPS, LISTED_RUNS, LISTED_STEPS = 100_000, 50, 5_000
REPORT_SECONDS, REPORT_MEGABYTES, LIST_SECONDS = 2.0, 200.0, 1.0
GROUPS = 2
"""Of MoE layers, each with a key of its own for every metric of layers."""
_MEASURED = """
import runpy, sys, time
began = 0.0
{work}
used = time.process_time() - began
with open("/proc/self/status") as status:
    print(used, next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024)
"""
_REPORT = """
from pathlib import Path
import matplotlib.backends.backend_agg, matplotlib.figure
from gpt4moe.pages.run_report import write_run_report
began = time.process_time()
write_run_report(Path(sys.argv[1]))
"""
_LIST = """
import contextlib, io
arguments, sys.argv = sys.argv[1:], ["runs.py", *sys.argv[1:]]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    runpy.run_path("tools/runs.py", run_name="__main__")
"""


def main(arguments: list[str]) -> None:
    read_options(__doc__, arguments)
    print(f"Reports and lists of runs. {machine()}\n")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        short = _measured(_REPORT, _run(folder / "short", 200))
        long = _run(folder / "long", REPORT_STEPS)
        seconds, megabytes = _measured(_REPORT, long)
        size = (long / METRICS_FILE).stat().st_size / 1e6
        print(f"report of {REPORT_STEPS:,} steps, {size:.0f} MB: {seconds:.1f} s, {megabytes:.0f} MB; "
              f"of 200 steps: {short[0]:.1f} s, {short[1]:.0f} MB")  # fmt: skip
        _verdict("s", seconds, REPORT_SECONDS)
        _verdict("MB", megabytes, REPORT_MEGABYTES)
        for number in range(LISTED_RUNS):
            _run(folder / "runs" / f"run-{number:02}", LISTED_STEPS)
        seconds, megabytes = _measured(_LIST, folder / "runs")
        print(f"list of {LISTED_RUNS} runs of {LISTED_STEPS:,} steps: {seconds:.1f} s, {megabytes:.0f} MB, its start "
              "included")  # fmt: skip
        _verdict("s", seconds, LIST_SECONDS)


def _verdict(unit: str, found: float, most: float) -> None:
    print(f"  {found / most:.2f} of the target of {most:g} {unit}: {'reached' if found <= most else 'NOT reached'}")


def _measured(work: str, folder: Path) -> tuple[float, float]:
    """Processor seconds and MB. Raises: CalledProcessError."""
    code = _MEASURED.format(work=work)
    done = subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, text=True)
    seconds, megabytes = map(float, done.stdout.split()[-2:])
    return seconds, megabytes


def _run(folder: Path, steps: int) -> Path:
    """A finished run of so many steps, with every metric of the table."""
    folder.mkdir(parents=True)
    rng = random.Random(steps)
    names = [name for name in METRICS if name not in ("step", "loss", "consumed_tokens", "task_score", "task_loss")]
    names += [f"{name}/layers_{10 * group:03}_{10 * group + 9:03}" for name in LAYER_METRICS for group in range(GROUPS)]
    with (folder / METRICS_FILE).open("w") as lines:
        for step in range(1, steps + 1):
            noise = rng.random()
            values = {name: (number % 7 + noise) / 3 for number, name in enumerate(names)}
            loss = 2 + 6 / (1 + step / 1000) + noise / 20
            lines.write(json.dumps({"step": step, "loss": loss, "consumed_tokens": 4096 * step, **values}) + "\n")
    (folder / "resolved.yaml").write_text(f"training: {{steps: {steps}}}\n")
    (folder / "identity.json").write_text("{}")
    start = {"event": "start", "time": 1e9, "run": folder.name, "job": None, "submitted": None, "job_started": None,
             "ranks": 1, "layout": "1 rank", "total_steps": steps, "resumed_step": 0, "last_sign_of_life": None,
             "redone_steps": 0, "redone_seconds": 0.0}  # fmt: skip
    stop = {"event": "stop", "time": 1e9 + 3 * steps, "step": steps, "reason": "finished", "is_error": False}
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in (start, stop)))
    return folder


if __name__ == "__main__":
    main(sys.argv[1:])
