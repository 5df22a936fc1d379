"""Builds one rank of a layout on a fake GPU and takes two training steps with the project's own code.

fake process group --> ProcessGroups --> build_model --> engine --> StepRunner --> evaluate, train_step, train_step
"""

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from gpt4moe.config.plan import images_per_sequence
from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import Batch
from gpt4moe.errors import Gpt4MoeError
from gpt4moe.gpu_rehearsal import fake_gpu, places
from gpt4moe.gpu_rehearsal.places import Place
from gpt4moe.gpu_rehearsal.recorder import Answers, Notes, Recorder
from gpt4moe.gpu_rehearsal.roofline import Roofline
from gpt4moe.model.gpt import build_model
from gpt4moe.model.parameters import language_chunks
from gpt4moe.parallel import deepspeed_groups, megatron_state
from gpt4moe.parallel.determinism import use_deterministic_kernels
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.layout import Layout
from gpt4moe.training.build import ENGINES
from gpt4moe.training.step import StepRunner
from gpt4moe.training.update import train_step

STEPS = 2
"""The second is reported: the first makes buffers and masks that stay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuRehearsal:
    """What one rank of a run would do on a GPU in one step."""

    run: RunConfig
    layout: Layout
    rank: int
    notes: Notes
    num_layers: int
    """Of this rank."""
    num_micro_batches: int
    schedule_kernels: int
    """Of the forward and backward passes."""
    evaluation_syncs: Counter[tuple[Place, str]]
    """Host syncs of one evaluation."""

    @property
    def kernels_per_layer(self) -> float:
        """Kernels of the passes, embedding and loss included, for each layer and micro-batch."""
        return self.schedule_kernels / max(self.num_layers * self.num_micro_batches, 1)

    @property
    def mfu_ceiling(self) -> float:
        return self.notes.roofline.mfu(self.run, self.layout)


@dataclass(slots=True)
class FakeRank:
    """One rank of a world on a fake GPU."""

    notes: Notes
    groups: ProcessGroups
    recorder: Recorder


@dataclass(slots=True)
class _Seen:
    num_layers: int = 0
    schedule_kernels: int = 0
    schedule_seconds: float = 0.0
    evaluation_syncs: Counter[tuple[Place, str]] = field(default_factory=Counter)


def rehearse(run: RunConfig, layout: Layout, rank: int) -> GpuRehearsal:
    """Takes the steps. The run must be legal on the layout, and guard.load() done.

    Raises: Gpt4MoeError as training would. Anything else that the GPU or its libraries refuse is a problem of the
        rehearsal.
    """
    notes, seen = Notes(Roofline.of(run)), _Seen()
    with fake_rank(run, layout, rank, notes) as here:
        _steps(run, here, seen)
    return GpuRehearsal(
        run=run, layout=layout, rank=rank, notes=notes, num_layers=seen.num_layers,
        num_micro_batches=run.training.global_batch_size // run.training.micro_batch_size // layout.dp,
        schedule_kernels=seen.schedule_kernels, evaluation_syncs=seen.evaluation_syncs,
    )  # fmt: skip


@contextmanager
def fake_rank(run: RunConfig, layout: Layout, rank: int, notes: Notes) -> Iterator[FakeRank]:
    """A rank of `layout`, whose tensors are fake. An error inside ends the block and becomes a problem of `notes`.

    Raises: Gpt4MoeError from inside.
    """
    fake_gpu.install(notes, run.cluster)
    if run.training.deterministic:
        use_deterministic_kernels()
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        with FakeTensorMode(allow_non_fake_inputs=False):
            groups = ProcessGroups.create(layout, rank, fake_gpu.GPU, seed=1)
            deepspeed_groups.start("fake")
            yield FakeRank(notes, groups, Recorder(notes, Answers.of(run, layout), run, layout))
    except Gpt4MoeError:
        raise
    except Exception as error:
        words = (str(error).splitlines() or [""])[0][:300]
        notes.problem(places.of_error(error.__traceback__), f"{type(error).__name__}: {words}")
    finally:
        torch.use_deterministic_algorithms(False)
        megatron_state.stop()
        distributed.destroy_process_group()


def build_chunks(run: RunConfig, here: FakeRank) -> list[Any]:
    """build_model; a parameter that is not on the GPU is a problem. The recorder must be active."""
    chunks = build_model(run, here.groups)
    _note_places_of_parameters(chunks, here.notes)
    return chunks


def _steps(run: RunConfig, here: FakeRank, seen: _Seen) -> None:
    """`seen` gets what was counted on the way."""
    notes, layout = here.notes, here.groups.layout
    with here.recorder:
        chunks = build_chunks(run, here)
        seen.num_layers = sum(len(chunk.decoder.layers) for chunk in language_chunks(chunks))
        engine = ENGINES[run.engine.kind](chunks, run, here.groups)
        runner = StepRunner(run, engine, here.groups)

    def after_reduce() -> None:
        seen.schedule_kernels = notes.kernels
        seen.schedule_seconds = notes.roofline.bound_seconds

    for step in range(1, STEPS + 1):
        notes.clear()
        batches = _batches(run, layout, warm_up=step < STEPS)
        with here.recorder:
            if step < STEPS:
                runner.evaluate(batches)
                seen.evaluation_syncs = notes.host_syncs.copy()
            train_step(runner, step, batches, after_reduce=after_reduce)
    notes.roofline.with_bubble(run, layout, seen.schedule_seconds)


def _note_places_of_parameters(chunks: list[Any], notes: Notes) -> None:
    """A module that ignores the device makes its parameters on the CPU. One problem for each class of modules."""
    elsewhere: dict[type, list[str]] = {}
    for chunk in chunks:
        for path, module in chunk.named_modules():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if tensor.device != fake_gpu.GPU:
                    elsewhere.setdefault(type(module), []).append(f"{path}.{name}")
    for kind, names in elsewhere.items():
        file, line = Path(inspect.getsourcefile(kind) or ""), inspect.getsourcelines(kind)[1]
        place = Place("/".join(file.parts[-3:]), line, kind.__name__)
        notes.problem(place, f"{len(names)} tensors are not made on the GPU, among them {names[0]}")


def _batches(run: RunConfig, layout: Layout, *, warm_up: bool) -> list[Batch]:
    """The micro-batches of one rank: whole sequences without padding.

    Args:
        warm_up: only as many as the pipeline schedule takes, and two for gradients to add up.
    """
    rows, length = run.training.micro_batch_size, run.model.seq_length

    def empty(dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(rows, length, dtype=dtype)

    number = run.training.global_batch_size // rows // layout.dp
    if warm_up:
        number = min(number, layout.pp if layout.vpp > 1 else 2)
    documents = empty() if run.attends_by_document else None
    return [
        Batch(empty(), empty(), empty(), empty(torch.float32), empty(), documents=documents, **_images(run, empty()))
        for _ in range(number)
    ]


def _images(run: RunConfig, media: torch.Tensor) -> dict[str, torch.Tensor]:
    """Fields of a Batch: as many still images in each row as a plan counts with. None of a text model."""
    if run.model.vision is None:
        return {}
    rows, images, side = len(media), ceil(images_per_sequence(run)), run.model.vision.encoder.image_size
    return {
        "media": media,
        "pixels": torch.empty(rows * images, 3, side, side, dtype=torch.uint8),
        "image_frames": torch.ones(rows * images, dtype=torch.int64),
        "image_rows": torch.arange(rows).repeat_interleave(images, output_size=rows * images),
    }
