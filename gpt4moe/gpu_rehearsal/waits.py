"""The operations for which the host waits for the GPU, and what they answer in place of values.

VALUES           the result depends on values: answered by `recorder.Answers`
copies_to_host   a copy from the GPU to the CPU; queues_copy_to_host: one that the host has to await before it reads
puts_by_mask     x[mask] = y
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from gpt4moe.gpu_rehearsal.recorder import Recorder

_aten = torch.ops.aten


def _scalar(recorder: "Recorder", args: Any, kwargs: Any) -> Any:
    if args[0].device.type == "cuda":
        recorder.notes.sync("item")
    elif (constant := getattr(args[0], "constant", None)) is not None:
        with _disable_current_modes():
            return constant.item()
    return recorder.read(args[0])


def known(constant: Tensor) -> Any:
    """The value or list of a tensor that is not fake."""
    with _disable_current_modes():
        return constant.tolist()


def _wait(recorder: "Recorder", tensor: Tensor, operation: str) -> None:
    """Values of the CPU's memory are there already."""
    if tensor.device.type == "cuda":
        recorder.notes.sync(operation)


def _nonzero(recorder: "Recorder", args: Any, kwargs: Any) -> Tensor:
    _wait(recorder, args[0], "nonzero")
    return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)


def _bincount(recorder: "Recorder", args: Any, kwargs: Any) -> Tensor:
    _wait(recorder, args[0], "bincount")
    length = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
    return args[0].new_empty((length,), dtype=torch.int64)


def _repeat_interleave(recorder: "Recorder", args: Any, kwargs: Any) -> Tensor:
    if kwargs.get("output_size") is None:
        _wait(recorder, args[0], "repeat_interleave")
    return args[0].new_empty((kwargs.get("output_size") or recorder.answers.rows,))


def _equal(recorder: "Recorder", args: Any, kwargs: Any) -> bool:
    _wait(recorder, args[0], "equal")
    return True


VALUES: dict[Any, Callable[["Recorder", Any, Any], Any]] = {
    _aten._local_scalar_dense.default: _scalar,
    _aten.nonzero.default: _nonzero,
    _aten.bincount.default: _bincount,
    _aten.repeat_interleave.Tensor: _repeat_interleave,
    _aten.equal.default: _equal,
}
"""Operations whose result depends on values: on a GPU the host waits for each."""


def copies_to_host(func: Any, args: Any, kwargs: Any) -> bool:
    if func is _aten._to_copy.default:
        target = kwargs.get("device")
        to_host = target is not None and torch.device(target).type == "cpu"
        return to_host and args[0].device.type == "cuda" and not kwargs.get("non_blocking")
    if func is _aten.copy_.default:
        blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        return args[0].device.type == "cpu" and args[1].device.type == "cuda" and blocking
    return False


def queues_copy_to_host(func: Any, args: Any, kwargs: Any) -> bool:
    """A copy into the host's memory that goes on behind the host's back."""
    is_copy = func is _aten.copy_.default and args[0].device.type == "cpu" and args[1].device.type == "cuda"
    return is_copy and not copies_to_host(func, args, kwargs)


def puts_by_mask(func: Any, args: Any) -> bool:
    """x[mask] = y: the host asks how many are True, except for one number of the CPU (torch then fills by the mask)."""
    if func._opname not in ("index_put_", "index_put", "_index_put_impl_") or args[0].device.type != "cuda":
        return False
    is_number = args[2].dim() == 0 and args[2].device.type == "cpu"
    return not is_number and any(index is not None and index.dtype is torch.bool for index in args[1])
