"""A run on a real ext4 that turns read-only, or stands still, after two checkpoints. By hand, as root:

  python -m tests.checkpoint.real_disk read-only    # an error of the file system, mounted with errors=remount-ro
  python -m tests.checkpoint.real_disk frozen       # fsfreeze for 60 s

Prints what the run says, when, and its exit status.
"""

import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from tests.training.command import SMALL

_FROZEN_SECONDS = 60.0


def call(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def befall(what: str, disk: Path) -> None:
    if what == "frozen":
        call("fsfreeze", "--freeze", disk)
        threading.Timer(_FROZEN_SECONDS, call, ("fsfreeze", "--unfreeze", disk)).start()
    else:
        device = Path(call("findmnt", "-no", "SOURCE", disk)).name
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("1")


def train(what: str, disk: Path) -> None:
    command = [
        sys.executable, "-u", "-m", "gpt4moe.train", *SMALL, f"run.root={disk}", "run.name=x", "training.steps=100000",
        "checkpoint.every=5", "checkpoint.asynchronous=true", "checkpoint.stall_seconds=15",
        "resilience.hang_seconds=10",
    ]  # fmt: skip
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.stdout is not None
    began, saved = 0.0, 0
    for line in run.stdout:
        saved += line.startswith("checkpoint ")
        if saved == 2 and not began:
            befall(what, disk)
            began = time.monotonic()
        if began:
            sys.stdout.write(f"{time.monotonic() - began:5.1f} s  {line}")
            sys.stdout.flush()
    sys.stdout.write(f"{time.monotonic() - began:5.1f} s  exit status {run.wait()}\n")


def main(what: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        image, disk = Path(name, "image"), Path(name, "disk")
        disk.mkdir()
        with image.open("wb") as file:
            file.truncate(300 * 2**20)
        call("mkfs.ext4", "-q", image)
        call("mount", "-o", "loop,errors=remount-ro", image, disk)
        try:
            train(what, disk)
        finally:
            with suppress(subprocess.CalledProcessError):
                call("fsfreeze", "--unfreeze", disk)
            call("umount", disk)


if __name__ == "__main__":
    if sys.argv[1:] not in (["read-only"], ["frozen"]):
        sys.exit(__doc__)
    main(sys.argv[1])
