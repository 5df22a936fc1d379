"""What a rank leaves of a launch that hung: <run folder>/hangs/<when the launch began>/, and the words on its stderr.

    rank-00003.txt            its last beat as JSON, then the stacks of all its threads (faulthandler)
    rank-00003.recorder.json  its last collectives, where torch's flight recorder has any

The recorder's file is as torch dumps it in JSON; what a device stands in is read from it too (`pending`).
"""

import contextlib
import faulthandler
import json
import os
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt4moe.resilience.standing import is_own, short_path
from gpt4moe.runlog.events_log import EVENTS_FILE, EventsLog

HANGS = "hangs"
_LAST_COLLECTIVES = 200
_RECORDER_SECONDS = 5.0
_RANKS_OF_A_FOLDER = 1000
"""Later ranks write into folders 001, 002, ... below: a shared file system is slow at a folder of 50,000 files."""
_MOST_READ = 64
"""Files of other ranks that are read where the store does not answer."""


class HangFiles:
    """Of one rank and launch. Nothing is made before it is needed.

    Args:
        token: of the launch (parallel.board).
    """

    def __init__(self, run_folder: Path, token: str, rank: int):
        self.run_folder = run_folder
        self.folder = run_folder / HANGS / token
        self.rank = rank

    def write(self, beat: str) -> None:
        """Stacks and recorder. An OSError is told on stderr: the rank ends all the same."""
        try:
            thousand = self.rank // _RANKS_OF_A_FOLDER
            folder = self.folder / (f"{thousand:03d}" if thousand else "")
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"rank-{self.rank:05d}.txt").open("w") as file:
                file.write(f"{beat}\n{_stacks()}")
            recorded = recorder()
            if recorded.get("entries"):
                recorded["entries"] = recorded["entries"][-_LAST_COLLECTIVES:]
                (folder / f"rank-{self.rank:05d}.recorder.json").write_text(json.dumps(recorded))
        except OSError as error:
            say(f"rank {self.rank}: its stacks cannot be written to {self.folder}: {error.strerror}.")

    def beats(self) -> dict[int, str]:
        """The last beats of the first ranks that have written theirs; of the first thousand alone: one folder."""
        found = sorted(self.folder.glob("rank-*.txt"))[:_MOST_READ]
        return {int(file.stem.split("-")[1]): file.read_text().partition("\n")[0] for file in found}

    def is_first_to_tell(self) -> bool:
        """Whether this is the first rank that asks; where the ranks' store has gone. Without a disk: every one is."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "told").mkdir()
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def write_events(self, step: int, lines: list[str]) -> None:
        """The event `hang`, and the launch's stop. By another rank than 0, where that does not answer: it has the file
        open, but writes nothing meanwhile."""
        path = self.run_folder / EVENTS_FILE
        if path.is_file():
            with EventsLog(path) as events:
                events.write("hang", step=step, cause=lines[0], waiting=lines[1], stacks=str(self.folder))
                events.write("stop", step=step, reason="hang", is_error=True, cause=lines[0])


def _stacks() -> str:
    """Of all threads. faulthandler holds Python's lock while it writes: so into memory, for a disk may block."""
    with os.fdopen(os.memfd_create("stacks"), "w+", errors="replace") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def say(*lines: str, kind: str = "error") -> None:
    """On stderr, past Python's buffers: the training thread may hold their lock for ever."""
    with contextlib.suppress(OSError):
        os.write(2, ("\n".join(line for line in (f"{kind}: {lines[0]}", *lines[1:]) if line) + "\n").encode())


def summary(error: BaseException) -> str:
    """An error in one line: its class, its text's first line, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if is_own(frame.filename)] or frames
    at = f" ({short_path(own[-1].filename)}:{own[-1].lineno} in {own[-1].name})" if own else ""
    text = str(error).strip().split("\n")[0][:300]
    return f"{type(error).__name__}{': ' * bool(text)}{text}{at}"


def recorder() -> dict[str, Any]:
    """torch's flight recorder of this process: NCCL's where there is one, else gloo's; empty where there is none, or
    where it does not answer."""
    from torch._C import _distributed_c10d as recorders

    dumps = [getattr(recorders, name, None) for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json")]
    texts: list[bytes] = []

    def ask() -> None:
        texts.extend(dump() for dump in dumps if dump is not None)

    asking = threading.Thread(target=ask, name="flight recorder", daemon=True)
    asking.start()
    asking.join(_RECORDER_SECONDS)
    found = [json.loads(text) for text in list(texts)]
    return next((one for one in found if one.get("entries")), {})


def pending(recorded: Mapping[str, Any], group_names: Mapping[str, str]) -> tuple[str, str]:
    """The oldest collective that has not ended, and its group; empty where there is none.

    Args:
        recorded: of `recorder`.
        group_names: torch's name of a group -> ours.
    """
    for entry in recorded.get("entries", ()):
        if not entry.get("retired", True) and entry.get("state") != "completed":
            kind = str(entry.get("profiling_name", "")).partition(":")[2]
            return kind or "a collective", group_names.get(str(entry.get("process_group", [""])[0]), "")
    return "", ""


_BROKEN = ("Connection closed", "Connection re", "Broken pipe", "imed out", "imeout")
"""What gloo says of a connection; of a wrong size it says something else."""


def is_broken_connection(error: Exception) -> bool:
    """Whether torch lost another rank: NCCL's and the store's errors have a class of their own, gloo's have not."""
    from torch import distributed

    text = str(error)
    is_gloo = isinstance(error, RuntimeError) and "gloo/" in text
    return isinstance(error, distributed.DistError) or (is_gloo and any(words in text for words in _BROKEN))
