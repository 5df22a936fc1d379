"""Seconds from the launch of four ranks to their first step in metrics.jsonl: imports, groups, model, one step.

Before that the CPU seconds of a rank's imports, as they are and with what gpt4moe/lean_imports.py leaves out.

    python -m benchmarks.startup

`LAUNCHER --nproc-per-node 4 -m gpt4moe.train +experiment=tiny data=mock`, tp 2, pp 2, ep 2, each time in a fresh run
folder, of two steps, for the last is followed by an evaluation. LAUNCHER, in turn: `python -m gpt4moe.launch_ranks`,
the same with `--imports each`, torchrun. The first launch also fills the disk cache and is shown apart. Target of
launch_ranks: at most 12 s.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.harness.command import read_options
from benchmarks.harness.process import machine

RANKS, LAUNCHES = 4, 3
TARGET_SECONDS = 12.0
PATIENCE_SECONDS = 300.0
OURS = "launch_ranks"
LAUNCHERS = {
    OURS: ("gpt4moe.launch_ranks",),
    "launch_ranks --imports each": ("gpt4moe.launch_ranks", "--imports", "each"),
    "torchrun": ("torch.distributed.run", "--standalone"),
}


def main(arguments: list[str]) -> None:
    read_options(__doc__, arguments)
    print(f"Launch of {RANKS} ranks (tp 2, pp 2, ep 2) to the first step. {machine()}")
    for name, first in (("imports of a rank", "gpt4moe"), ("the same, Megatron first", "megatron.core")):
        print(f"  {name}: {min(_import_cpu_seconds(first) for _ in range(LAUNCHES)):.1f} CPU s")
    seconds: dict[str, list[float]] = {name: [] for name in LAUNCHERS}
    with tempfile.TemporaryDirectory() as folder:
        print(f"    first: {_seconds_to_first_step(Path(folder), OURS, 'startup'):5.1f} s ({OURS})")
        for launch in range(LAUNCHES):
            for name in LAUNCHERS:
                seconds[name].append(_seconds_to_first_step(Path(folder), name, f"startup-{name.split()[-1]}-{launch}"))
    for name, ones in seconds.items():
        print(f"  median {median(ones):5.1f} s ({', '.join(f'{one:.1f}' for one in ones)}): {name}")
    found = median(seconds[OURS])
    print(f"target of {OURS}: at most {TARGET_SECONDS:.0f} s: ", end="")
    print("reached" if found <= TARGET_SECONDS else "NOT reached")


def _import_cpu_seconds(first: str) -> float:
    code = f"import time, {first}, gpt4moe.train, gpt4moe.training.build; print(time.process_time())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _seconds_to_first_step(root: Path, launcher: str, name: str) -> float:
    """Raises: RuntimeError with the end of its output when the run does not get there."""
    command = [
        sys.executable, "-m", *LAUNCHERS[launcher], "--nproc-per-node", str(RANKS),
        "-m", "gpt4moe.train", "+experiment=tiny", "data=mock", "parallel=tp2_pp2_ep2", "training.steps=2",
        f"run.root={root}", f"run.name={name}",
    ]  # fmt: skip
    metrics, output = root / name / "metrics.jsonl", root / f"{name}.txt"
    start = time.perf_counter()
    with output.open("w") as log:
        # A session of its own, so that the ranks end with their launcher.
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                elapsed = time.perf_counter() - start
                if process.poll() not in (None, 0) or elapsed > PATIENCE_SECONDS:
                    raise RuntimeError(f"no step after {elapsed:.0f} s: {output.read_text()[-2000:]}")
                time.sleep(0.02)
            elapsed = time.perf_counter() - start
            process.wait(PATIENCE_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return elapsed


if __name__ == "__main__":
    main(sys.argv[1:])
