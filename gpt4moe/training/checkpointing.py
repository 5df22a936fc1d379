"""The engine's state <-> a checkpoint.

save   Engine.owned --model.parameters.shards--> pieces --Staging--> checkpoint.saving.Save, by training.saver
load   CheckpointReader --model.weights.load_weights--> masters, states, buffers --Engine.finish_load--> weights
"""

import logging
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from math import prod
from typing import Any

import torch

from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.reader import CheckpointReader
from gpt4moe.checkpoint.selection import stored_names
from gpt4moe.checkpoint.storage import Piece
from gpt4moe.config.load import config_to_dict
from gpt4moe.errors import CheckpointError
from gpt4moe.model.weights import load_weights
from gpt4moe.parallel.agreement import raise_together
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.training.engine import Engine
from gpt4moe.training.identity import identity_of
from gpt4moe.training.state import TrainingContext

logger = logging.getLogger(__name__)

_PORTABLE = 1
"""cudaHostRegisterPortable: locked for every GPU of the process."""


class Staging:
    """Host memory to which a save copies the state, so that training goes on while a thread writes it.

    It is one buffer for what a rank owns (fp32 masters and optimizer states). The first save allocates it, and later
    saves use it again. A new save waits until the save before it is finished.
    """

    def __init__(self) -> None:
        self.buffer = torch.empty(0)
        self._is_locked = False

    def copy(self, pieces: list[Piece]) -> list[Piece]:
        """The same pieces with their values in the buffer. The copy is complete when this returns."""
        total = sum(prod(piece.shape) for piece in pieces)
        devices = {piece.values.device for piece in pieces if piece.values.is_cuda}
        if self.buffer.numel() < total:
            self._allocate(total, locked=bool(devices))
        staged, end = [], 0
        for piece in pieces:
            start, end = end, end + prod(piece.shape)
            values = self.buffer[start:end]
            values.copy_(piece.values.detach().reshape(-1), non_blocking=True)
            staged.append(Piece(piece.tensor, piece.global_shape, piece.offset, piece.shape, values))
        for device in devices:
            torch.cuda.synchronize(device)
        return staged

    def close(self) -> None:
        """Gives the buffer back: a run that goes back has another Staging afterwards."""
        try:
            self._unlock()
        except RuntimeError as error:
            logger.warning("%.1f GB stay page-locked: %s", self.buffer.nbytes / 1e9, error)
            _forget_cuda_error()
        self.buffer = torch.empty(0)

    def _unlock(self) -> None:
        if self._is_locked:
            self._is_locked = False
            _require_success(torch.cuda.cudart().cudaHostUnregister(self.buffer.data_ptr()))

    def _allocate(self, num_elements: int, *, locked: bool) -> None:
        """A new buffer in place of the old one.

        Args:
            locked: pages are locked, so that GPUs copy at full speed. Not by torch.empty(pin_memory=True), which rounds
                up to a power of two and takes 64 GB where 36 are asked for (torch 2.13's CachingHostAllocator).
        """
        self._unlock()
        self.buffer = torch.empty(0)  # frees the old buffer before the new one is allocated
        self.buffer = torch.empty(num_elements, dtype=torch.float32)
        if locked:
            try:
                cuda = torch.cuda.cudart()
                _require_success(cuda.cudaHostRegister(self.buffer.data_ptr(), self.buffer.nbytes, _PORTABLE))
                self._is_locked = True
            except RuntimeError as error:
                logger.warning("saves copy slowly: %.1f GB cannot be page-locked: %s", self.buffer.nbytes / 1e9, error)
                _forget_cuda_error()


def _require_success(status: Any) -> None:
    if int(status) != 0:
        raise RuntimeError(f"CUDA says {int(status)}")


def _forget_cuda_error() -> None:
    """CUDA keeps the last failed call's error, and torch raises it at the next launch: here, in place of training."""
    with suppress(RuntimeError, AssertionError):  # AssertionError: this torch has no CUDA
        torch.zeros(1, device="cuda").add_(1)


def manifest_of(context: TrainingContext) -> Manifest:
    """The manifest of the current step, without its files."""
    run, state = context.run, context.state
    return Manifest(
        step=state.step,
        consumed_samples=state.consumed_samples,
        consumed_per_source=context.data.consumed_per_source(state.consumed_samples, state.passed_over),
        optimizer_step=state.optimizer_step,
        run_id=context.folder.run_id,
        identity=identity_of(run, context.data.identity),
        config=config_to_dict(run),
        layout=context.groups.layout.describe(),
        versions={name: version(name) for name in ("torch", "megatron-core", "deepspeed")},
        files=[],
        tensor_names=stored_names(run.model),
        base=context.base,
        recent=asdict(state.recent) if run.resilience.needs_numbers else None,
        passed_over=state.passed_over.as_lists() or None,
    )


def fill(
    reader: CheckpointReader, engine: Engine, groups: ProcessGroups, *, weights_only: bool, names: Collection[str]
) -> None:
    """Fills what this rank's optimizer owns and the model's buffers, whatever layout wrote them. Collective; call
    engine.finish_load next.

    Args:
        weights_only: the optimizer's states stay as they are, as for a new run from old weights.
        names: the weights and buffers to fill (selection_of); the others stay as they are, and their states.
    Raises: CheckpointError on every rank when any finds that the checkpoint is damaged, or of another model or
        optimizer.
    """
    if not weights_only:
        with raise_together(groups):
            _require_same_states(reader, engine)
    load_weights(reader, engine.chunks, groups, names=names, owned=engine.owned(), with_states=not weights_only)


def _require_same_states(reader: CheckpointReader, engine: Engine) -> None:
    stored = reader.manifest.optimizer.states
    kept = next((tuple(owned.states) for owned in engine.owned()), stored)
    if set(kept) != set(stored):
        raise CheckpointError(
            f"{reader.folder} has the optimizer states {', '.join(stored)}; this run's optimizer keeps "
            f"{', '.join(kept) or 'none'}.",
            "Set optimizer.kind as in its manifest.json, or give another run.name with "
            f"checkpoint.load={reader.folder} checkpoint.load_only=['*'] to take its weights alone.",
        )
