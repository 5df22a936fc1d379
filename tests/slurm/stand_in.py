"""Stands for gpt4moe/train.py in tests of slurm/train.sh itself: notes what its rank sees, then ends as told.

`end=N`: exit status; -N: killed by signal N at once. `hang=yes`: all but the first rank hang instead.
`signal=N`: waits for USR2 or TERM, then exits with N, and notes a USR1; a restart ends at once. `late=S`: only after S
seconds it has handlers.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

arguments = dict(word.split("=", 1) for word in sys.argv[1:])
rank, start = os.environ["SLURM_PROCID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def save_and_leave(*_: object) -> None:
    time.sleep(0.3 * int(rank))  # ranks end one after the other
    Path(f"left-{start}-{rank}").touch()
    sys.exit(int(arguments["signal"]))


if int(arguments.get("end", "0")) < 0:
    os.kill(os.getpid(), -int(arguments["end"]))
if "late" in arguments:
    Path(f"late-{rank}").touch()
    time.sleep(float(arguments["late"]))
if "signal" in arguments:
    signal.signal(signal.SIGUSR1, lambda *_: Path(f"saved-{start}-{rank}").touch())
    signal.signal(signal.SIGUSR2, save_and_leave)
    signal.signal(signal.SIGTERM, save_and_leave)
seen = {"argv": sys.argv[1:], "environment": dict(os.environ), "cwd": os.getcwd()}
note = Path(f"rank-{start}-{rank}.json")
note.with_suffix(".part").write_text(json.dumps(seen))
note.with_suffix(".part").rename(note)
sys.stdout.write(f"rank {rank} of start {start}\n")
sys.stdout.flush()
if "hang" in arguments and rank != "0":
    time.sleep(90)
if "signal" in arguments and start == 0:
    Path(f"pid-{rank}").write_text(str(os.getpid()))
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        time.sleep(0.1)
sys.exit(int(arguments.get("end", "0")))
