"""One case of the fuzz: a command's own `main` in a forked child, with limits, and what the child left behind.

    copy of the valid files -> damages -> listing -> fork: main(arguments) -> output, status -> listing -> verdict

A fork costs milliseconds where a cold process costs seconds, and a child that dies takes nothing with it.
"""

import hashlib
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

LIMIT_SECONDS = 240
"""Of wall time, for a child that waits for ever: a machine under load is no fault. Of processor time, which counts,
SECONDS."""
SECONDS = 10
MEMORY_BYTES = 6 * 2**30
"""Of address space beyond what the parent has mapped."""
_OUTPUT = 20_000

KEPT = ("*.bad_images.jsonl", "*/.*.work", "*/.*.work/*")
"""What a refused command may leave, by its documentation: the list of bad images, beside where the source would be; the
part of a source that is made, with which the same command goes on."""
REFUSED, FOUND, TAKEN = "refused", "found", "taken"
"""Exit status 2 with its two lines; 1 with what was found; 0: a damage that the command does not read, or may read."""


@dataclass(frozen=True)
class Ended:
    """How a command ended; status None: it was stopped at its limit."""

    status: int | None
    out: str
    err: str
    wrote: list[str]
    """Files that are new, changed or gone."""


def run_forked(main: Callable[[], int | None], folder: Path) -> Ended:
    """Runs `main` in a child whose working folder is `folder`."""
    before = listing(folder)
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as err:
        child = os.fork()
        if not child:
            _in_child(main, folder, out.fileno(), err.fileno())
        status = _wait(child)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read(_OUTPUT).decode(errors="replace"))
    after = listing(folder)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return Ended(status, *texts, changed)


def _in_child(main: Callable[[], int | None], folder: Path, out: int, err: int) -> None:
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.dup2(out, 1)
        os.dup2(err, 2)
        # pytest may have put streams of its own in their place.
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        status = main() or 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int) -> int | None:
    """Its exit status, or minus the signal that ended it; None where it was stopped at the limit."""
    handle = os.pidfd_open(child)
    try:
        waiting = select.poll()
        waiting.register(handle, select.POLLIN)
        is_late = not waiting.poll(LIMIT_SECONDS * 1000)
    finally:
        os.close(handle)
    if is_late:
        os.killpg(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if is_late or status == -signal.SIGXCPU else status


def listing(folder: Path) -> dict[str, str]:
    """Every file below a folder -> a hash of it; of links and folders what they are."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
    return found


def verdict(ended: Ended, statuses: Sequence[int] = (0, 2)) -> tuple[str, str]:
    """(refused, found or taken; or "fault", and why).

    Args:
        statuses: that the command may have. 1 is a find of commands that look for damage.
    """
    text = ended.out + ended.err
    if ended.status is None:
        return "fault", f"did not end in {SECONDS} s"
    if "Traceback (most recent call last)" in text:
        return "fault", text.strip().splitlines()[-1][:200]
    if ended.status not in statuses:
        return "fault", f"exit status {ended.status}: {text.strip()[-200:]}"
    if ended.status != 2:
        if ended.status == 1 and len(text.strip()) < len("a word"):
            return "fault", "exit status 1 without a word"
        return (FOUND, "") if ended.status == 1 else (TAKEN, "")
    folders = {parent.as_posix() for name in ended.wrote for parent in Path(name).parents}
    wrote = [name for name in ended.wrote if name not in folders and not any(fnmatch(name, kept) for kept in KEPT)]
    if wrote:
        return "fault", f"refused, and wrote {', '.join(wrote[:5])}"
    lines = [line for line in ended.err.splitlines() if line.strip()]
    if lines and lines[0].startswith("usage: ") and re.search(r"^\S.*: error: .", ended.err, re.MULTILINE):
        return REFUSED, lines[-1]  # of argparse: what is wrong, below how it is written
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    lines = lines[starts[0] :] if starts else lines  # before them a tool may have said what it does
    if len(lines) != len(("cause", "cure")):
        return "fault", f"{len(lines)} lines in place of a cause and a cure: {' / '.join(lines)[:200]}"
    return REFUSED, " ".join(lines)


def copied(world: Path, names: Sequence[str], target: Path) -> None:
    """Copies the folders or files that a case needs."""
    for name in names:
        source = world / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True)
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / name)
