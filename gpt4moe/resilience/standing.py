"""Where a thread stands, read from its Python frames: which collective, of which group, layer and micro-batch.

A thread that waits in a collective stands in torch's function of that name, or in a function of Megatron that waits for
one begun before. Frames further out belong to a layer and to the pipeline schedule, whose locals say the rest. So a
step does nothing for this; the watchdog looks when a rank has not moved.

    innermost  all_reduce(group=...)  <  Dispatcher.plan  <  TransformerLayer.forward(self.layer_number)
               <  forward_step(current_microbatch)  <  forward_backward_...

Names are those of torch 2.13 and megatron-core 0.16.1 and 0.19.2. What a frame does not say is left out.
"""

import inspect
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

_COLLECTIVES = "torch/distributed/distributed_c10d.py"
_SCHEDULES = "megatron/core/pipeline_parallel/schedules.py"
_NOT_ONE = frozenset({"wrapper", "__exit__", "wait", "new_group", "destroy_process_group"})
_WAITS = {
    "_communicate": ("send and receive", "pp_group"),
    "finish_grad_sync": ("reduction of gradients", "data_parallel_group"),
    "finish_param_sync": ("gathering of weights", "data_parallel_group"),
}
"""Functions of Megatron that wait for what was begun before: what it is, and the attribute that holds its group."""
_LIBRARY = sysconfig.get_paths()["stdlib"]
_DEBUGGERS = (*(f"{_LIBRARY}/{name}.py" for name in ("pdb", "bdb", "code")), "/IPython/", "/pydevd", "/debugpy/")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the training thread of a rank stands."""

    at: str = ""
    """File, line and function of its innermost frame outside Python's library and torch's."""
    collective: str = ""
    """Empty: it is in none."""
    group: str = ""
    """tp, ep, ... or world."""
    layer: int | None = None
    """From 0, as in the names of tensors."""
    micro_batch: int | None = None
    """From 0, of this rank's."""
    is_backward: bool = False

    @property
    def words(self) -> str:
        """One phrase: the collective and its group, or the frame alone; then what is known of layer and micro-batch."""
        what = f"{self.collective} of {self.group or 'a group without a name'}" if self.collective else self.at
        where = [f"layer {self.layer}"] * (self.layer is not None)
        where += [f"micro-batch {self.micro_batch}"] * (self.micro_batch is not None)
        where += ["backward pass" if where else "backward pass, layer not known"] * self.is_backward
        where += [self.at] * bool(self.collective)
        return f"{what} ({', '.join(where)})" if where else what


def frames(innermost: FrameType | None) -> Iterator[FrameType]:
    while innermost is not None:
        yield innermost
        innermost = innermost.f_back


def mark(innermost: FrameType | None) -> int:
    """A number that changes when the thread moves. Reads no locals, so that it keeps no tensor alive."""
    return hash(tuple((id(frame.f_code), frame.f_lasti) for frame in frames(innermost)))


def waits_in_collective(innermost: FrameType | None) -> bool:
    """Whether the thread is in a collective. Reads no locals."""
    return any(_is_collective(frame) or frame.f_code.co_name in _WAITS for frame in frames(innermost))


def is_debugged(innermost: FrameType | None) -> bool:
    """Whether a debugger holds the thread."""
    return any(part in frame.f_code.co_filename for frame in frames(innermost) for part in _DEBUGGERS)


def place_of(innermost: FrameType | None, group_names: Mapping[int, str]) -> Place:
    """Where a thread stands.

    Args:
        innermost: its frame, as sys._current_frames() has it.
        group_names: id of a process group -> its name.
    """
    stack = list(frames(innermost))
    collective, group = "", ""
    for frame in stack:
        if frame.f_code.co_name == "wrapper":
            continue
        if _is_collective(frame):
            collective, group = frame.f_code.co_name, _group_name(_local(frame, "group"), group_names)
        elif frame.f_code.co_name in _WAITS and not collective:
            collective, attribute = _WAITS[frame.f_code.co_name]
            group = group_names.get(id(getattr(_local(frame, "self"), attribute, None)), "")
        elif collective:
            break
    return Place(
        at=next(
            (_short(frame) for frame in stack if is_own(frame.f_code.co_filename)), _short(stack[0]) if stack else ""
        ),
        collective=collective,
        group=group,
        layer=next((number for frame in stack if (number := _layer(frame)) is not None), None),
        micro_batch=_micro_batch(stack),
        is_backward=any(frame.f_code.co_name in ("backward_step", "_engine_run_backward") for frame in stack),
    )


@contextmanager
def _locals(frame: FrameType) -> Iterator[Mapping[str, Any]]:
    """Before Python 3.13 the frame keeps this copy of its locals, and with it every tensor, until its function returns:
    so it is emptied. Of a module it is no copy."""
    its = frame.f_locals
    try:
        yield its
    finally:
        if isinstance(its, dict) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            its.clear()


def _local(frame: FrameType, name: str) -> Any:
    with _locals(frame) as its:
        return its.get(name)


def _is_collective(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_filename.endswith(_COLLECTIVES) and code.co_name not in _NOT_ONE and code.co_name[0] != "<"


def _group_name(group: Any, names: Mapping[int, str]) -> str:
    return "world" if group is None else names.get(id(group), "")


def is_own(file: str) -> bool:
    """Whether a file is of this program, of Megatron or of DeepSpeed."""
    _, is_package, package = file.rpartition("site-packages/")
    if is_package:
        return package.startswith(("megatron/", "deepspeed/"))
    return not file.startswith((_LIBRARY, "<"))


def _short(frame: FrameType) -> str:
    code = frame.f_code
    return f"{short_path(code.co_filename)}:{frame.f_lineno} in {code.co_name}"


def short_path(file: str) -> str:
    """A path from its package on: megatron/core/..., gpt4moe/...; of another file the last two parts."""
    for mark in ("site-packages/", "/gpt4moe/"):
        _, found, after = file.rpartition(mark)
        if found:
            return after if mark.startswith("site") else f"gpt4moe/{after}"
    return "/".join(Path(file).parts[-2:])


def _layer(frame: FrameType) -> int | None:
    if frame.f_code.co_name not in ("forward", "_forward_attention", "_forward_mlp"):
        return None
    number = getattr(_local(frame, "self"), "layer_number", None)
    return number - 1 if isinstance(number, int) else None


def _micro_batch(stack: list[FrameType]) -> int | None:
    """Of the forward pass it is an argument; of the rest of a schedule it follows from the loop's number."""
    called = ""
    for frame in stack:
        code = frame.f_code
        if code.co_filename.endswith(_SCHEDULES):
            if code.co_name == "forward_step":
                number = _local(frame, "current_microbatch")
                return number if isinstance(number, int) else None
            if code.co_name.startswith("forward_backward_"):
                try:
                    with _locals(frame) as its:
                        return _in_schedule(code.co_name, called, its)
                except (KeyError, TypeError):  # another version's names
                    return None
        if code.co_name != "wrapper":  # megatron-core 0.19.2 has one around each function of its communicator
            called = code.co_name
    return None


def _in_schedule(schedule: str, called: str, its: Mapping[str, Any]) -> int | None:
    """Args: called: the function that the schedule's frame is in; its: that frame's locals."""
    if schedule == "forward_backward_no_pipelining":
        return len(its["forward_data_store"]) - 1 if called == "backward_step" else None
    if schedule != "forward_backward_pipelining_without_interleaving":
        return None
    number, warm_up, rest = its.get("i", 0), its["num_warmup_microbatches"], its["num_microbatches_remaining"]
    waiting = len(its["input_tensors"])  # whose backward pass has not begun
    answers = {
        "recv_forward": waiting,
        "send_forward_recv_backward": number,
        "send_backward_recv_forward": number + 1 + warm_up,
        "recv_backward": number + rest,
        "backward_step": number if waiting >= warm_up and rest else number + rest,
    }
    answer = answers.get(called)
    return answer if isinstance(answer, int) else None
