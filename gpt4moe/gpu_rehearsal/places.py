"""The line of code that an operation comes from, found on the Python stack."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

_ROOM = str(Path(__file__).parent)
_ROOT = str(Path(__file__).parents[2]) + "/"
_OTHERS = ("/site-packages/megatron/", "/site-packages/deepspeed/")
_AUTOGRAD = "autograd"


@dataclass(frozen=True, slots=True)
class Place:
    """A line of this project, and before it the line of Megatron or DeepSpeed that it called, if any."""

    file: str
    """Relative to the project or to site-packages; "autograd" where a backward pass has no Python line."""
    line: int
    function: str
    caller: "Place | None" = None

    def __str__(self) -> str:
        here = f"{self.file}:{self.line} {self.function}" if self.line else self.file
        return f"{here} < {self.caller}" if self.caller else here

    @property
    def without_line(self) -> str:
        """File and function: stays the same while other lines of the file change."""
        here = f"{self.file} {self.function}".strip()
        return f"{here} < {self.caller.without_line}" if self.caller else here


def here() -> Place:
    """The place that runs now. Lines of this room are none."""
    return _first(_outwards(sys._getframe(1)))


def of_error(traceback: TracebackType | None) -> Place:
    """Where an error was raised."""
    frames = []
    while traceback is not None:
        frames.append((traceback.tb_frame, traceback.tb_lineno))
        traceback = traceback.tb_next
    return _first(reversed(frames))


def functions(most: int = 6) -> str:
    """The innermost functions of this project, Megatron and DeepSpeed, as "file.py:function file.py:function"."""
    names = []
    for frame, _ in _outwards(sys._getframe(1)):
        file = frame.f_code.co_filename
        if _is_ours(file) or any(other in file for other in _OTHERS):
            names.append(f"{file.rsplit('/', 1)[-1]}:{frame.f_code.co_name}")
            if len(names) == most:
                break
    return " ".join(names)


def _outwards(frame: FrameType | None) -> Iterable[tuple[FrameType, int]]:
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def _first(frames: Iterable[tuple[FrameType, int]]) -> Place:
    """The innermost line of this project; if Megatron or DeepSpeed are further inside, their innermost line too."""
    inner = None
    for frame, line in frames:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if _is_ours(file):
            own = Place(file.removeprefix(_ROOT), line, function)
            return Place(*inner, own) if inner else own
        if inner is None and any(other in file for other in _OTHERS):
            inner = (file.split("/site-packages/")[1], line, function)
    return Place(*inner) if inner else Place(_AUTOGRAD, 0, "")


def _is_ours(file: str) -> bool:
    return file.startswith(_ROOT) and "/site-packages/" not in file and not file.startswith(_ROOM)
