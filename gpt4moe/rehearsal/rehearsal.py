"""Rehearsal: builds every kind of rank of a run of any size, without its devices, and checks what it built.

roles -> rehearse_rank, in a few processes -> bytes against the planner's, groups against the layout
                                           -> checkpoint files of all ranks, without data -> every tensor once
                                        -> inference files -> every rank reads its own, all of it, and no other
"""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

from gpt4moe.architecture.tensors import logical_shapes
from gpt4moe.architecture.trained import trained_names
from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.retention import step_folder
from gpt4moe.checkpoint.saving import commit
from gpt4moe.checkpoint.selection import stored_names
from gpt4moe.config.load import config_to_dict
from gpt4moe.config.optimizer import EngineKind
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import CheckpointError, ConfigError, ConversionError, LayoutError
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import require_legal
from gpt4moe.parallel.placement import rank_chunks
from gpt4moe.parallel.shard import WEIGHT
from gpt4moe.planner.memory import StageMemory, memory_per_stage
from gpt4moe.planner.states import optimizer_bytes, stage_buffers
from gpt4moe.rehearsal.files import (
    CheckpointFiles,
    InferenceFiles,
    InferenceReads,
    StageReads,
    checkpoint_files,
    require_grid,
    write_inference,
)
from gpt4moe.training.identity import identity_of

GPT4_SERVING = (8, 16)
_DENSE, _EXPERT = ("tp", "cp", "dp"), ("etp", "ep", "expert_dp")


@dataclass(frozen=True, slots=True)
class HeldBytes:
    """One rank's states."""

    weights: int
    gradients: int
    optimizer: int


@dataclass(kw_only=True, slots=True)
class RankReport:
    """What was built of one rank of a rehearsal."""

    rank: int
    held: HeldBytes
    parameters: int
    problems: list[str] = field(default_factory=list)
    stage_files: int = 0
    """Checkpoint files written for its stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """What was built and written, and the problems that were found."""

    run: RunConfig
    layout: Layout
    ranks: list[RankReport]
    planned: list[StageMemory]
    checkpoint: CheckpointFiles | None
    inference: InferenceFiles | None
    not_rehearsed: list[str]
    problems: list[str]

    @property
    def peak(self) -> RankReport:
        """Of the ranks built, the one whose stage needs most memory; of its stage, the one that holds most."""
        return max(self.ranks, key=lambda report: total_bytes(report.held, self.planned[self.stage(report)]))

    def stage(self, report: RankReport) -> int:
        return self.layout.coordinate(report.rank)["pp"]


def total_bytes(held: HeldBytes, planned: StageMemory) -> int:
    """States as built, and what the planner adds for activations, buffers and reserve."""
    states = held.weights + held.gradients + held.optimizer
    return states + planned.total_bytes - planned.states_bytes


def roles(run: RunConfig, layout: Layout, fullest: list[int]) -> list[int]:
    """The ranks to build: the first of every stage, and of every kind of stage the corners of both its grids
    (tp x cp x dp and etp x ep x expert_dp, first and last of each axis) and the one in `fullest`.

    Stages are of one kind that have the same kinds of layers and are both, or neither, the first or last.
    """
    corners = {
        inside
        for inside in range(layout.stage_size)
        for axes in (_DENSE, _EXPERT)
        if all(layout.coordinate(inside)[axis] in (0, getattr(layout, axis) - 1) for axis in axes)
    }
    kinds: dict[Any, int] = {}  # kind -> its first stage
    for stage in range(layout.pp):
        chunks = rank_chunks(run.model.num_layers, run.parallel, stage)
        layers = tuple(tuple(run.model.layer_kinds[layer] for layer in chunk) for chunk in chunks)
        kinds.setdefault((layers, stage == 0, stage == layout.pp - 1), stage)
    firsts = {stage * layout.stage_size for stage in range(layout.pp)}
    whole = {stage * layout.stage_size + inside for stage in kinds.values() for inside in corners}
    return sorted(firsts | whole | {fullest[stage] for stage in kinds.values()})


def rehearse(
    run: RunConfig, world_size: int, out: Path, inference: tuple[int, int] | None,
    on_start: Callable[[int], None], on_rank: Callable[[], None], on_stage: Callable[[str], None] = lambda _: None,
) -> Rehearsal:  # fmt: skip
    """Builds every role and writes the hollow files.

    Args:
        out: a folder that is empty or not there.
        inference: tp and pp of the serving ranks; None: GPT-4's reported 8 x 16, where it fits the model.
        on_start: called with the number of ranks to build.
        on_rank: is called after each.
        on_stage: called with what is done after the last rank.
    Raises: LayoutError, ConfigError for a run that the trainer would refuse or another engine; ConversionError for an
        `inference` that does not fit; ConfigError when `out` has files or cannot be written.
    """
    _require_empty(out)
    require_legal(run.model, run.parallel, run.training, world_size)
    if run.engine.kind is not EngineKind.megatron:
        raise ConfigError(
            f"engine={run.engine.kind.value} is not rehearsed: DeepSpeed's does not build on torch's meta device.",
            "Leave engine as it is; the layout is the same under both.",
        )
    grid, missing = _serving_grid(run, inference)
    layout = Layout.from_config(run.parallel, world_size)
    planned = memory_per_stage(run, layout)
    folder = step_folder(out / "checkpoints", 1)
    _make(folder)
    ranks = roles(run, layout, [stage.rank for stage in planned])
    on_start(len(ranks))
    reports = _build(run, layout, ranks, folder, on_rank)
    problems = [f"rank {report.rank}: {problem}" for report in reports for problem in report.problems]
    problems += _byte_problems(run, layout, reports, planned)
    checkpoint, serving = None, None
    try:
        on_stage(f"reading {world_size} checkpoint files back")
        commit(folder, _manifest(run, layout), world_size)
        checkpoint = checkpoint_files(folder)
        problems += _size_problems(run, checkpoint)
        if grid:
            on_stage(f"cutting {grid[0] * grid[1]} inference files")
            serving = write_inference(folder, out / "inference", *grid)
            on_stage(f"reading them as {grid[0] * grid[1]} ranks")
            serving = replace(serving, **_read(serving, missing))
            problems += serving.problems
    except CheckpointError as error:
        problems.append(error.cause)
    except ConversionError as error:
        missing.append(f"inference files: {error.cause}")
    return Rehearsal(
        run=run, layout=layout, ranks=reports, planned=planned, checkpoint=checkpoint, inference=serving,
        not_rehearsed=missing, problems=problems,
    )  # fmt: skip


def _serving_grid(run: RunConfig, asked: tuple[int, int] | None) -> tuple[tuple[int, int] | None, list[str]]:
    """(tp and pp of the inference files, or None; why none)"""
    if run.model.lora is not None:
        return None, ["inference files: the checkpoint holds adapters alone (convert_checkpoint.py merges them)"]
    try:
        require_grid(run.model, *(asked or GPT4_SERVING))
    except ConversionError as error:
        if asked:
            raise
        return None, [f"inference files, by default tp 8 x pp 16: {error.cause}"]
    return asked or GPT4_SERVING, []


def _build(
    run: RunConfig, layout: Layout, ranks: list[int], folder: Path, on_rank: Callable[[], None]
) -> list[RankReport]:
    """The reports, by rank."""
    config = config_to_dict(run)
    with _processes(len(ranks)) as pool:
        started = [
            pool.submit(_rehearse_rank, config, layout.world_size, rank, None if rank % layout.stage_size else folder)
            for rank in ranks
        ]
        for _ in as_completed(started):
            on_rank()
        return [future.result() for future in started]


def _read(files: InferenceFiles, missing: list[str]) -> dict[str, Any]:
    """`reads` and `problems` of the files, after every rank has read what it needs of them. Adds to `missing`."""
    stages = range(files.pp)
    try:
        with _processes(files.pp) as pool:
            found = list(pool.map(_read_stage, *zip(*((files, stage) for stage in stages), strict=True)))
    except LayoutError as error:
        missing.append(f"reading the inference files: {error.cause}")
        return {}
    sizes = [size for stage in found for size in stage.rank_bytes]
    reads = InferenceReads(
        ranks=len(sizes), shards=sum(stage.shards for stage in found), least_bytes=min(sizes), most_bytes=max(sizes),
        total_bytes=sum(sizes),
    )  # fmt: skip
    return {"reads": reads, "problems": files.problems + [problem for stage in found for problem in stage.problems]}


def _processes(most: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        min(most, os.cpu_count() or 1), mp_context=multiprocessing.get_context("forkserver")
    )  # fmt: skip


def _read_stage(files: InferenceFiles, stage: int) -> StageReads:
    from gpt4moe.rehearsal.reading import read_stage

    return read_stage(files.folder, files.tp, files.layers_per_stage, stage)


def _rehearse_rank(config: dict[str, Any], world_size: int, rank: int, checkpoint: Path | None) -> RankReport:
    # Megatron takes seconds to import: this process, which builds nothing, does without.
    from gpt4moe.rehearsal.rank import rehearse_rank

    return rehearse_rank(config, world_size, rank, checkpoint)


def _byte_problems(run: RunConfig, layout: Layout, reports: list[RankReport], planned: list[StageMemory]) -> list[str]:
    """Where what was built holds other bytes than the planner says."""
    problems = []
    for stage, memory in enumerate(planned):
        optimizers = optimizer_bytes(run, layout, stage_buffers(run, layout, stage))
        for report in reports:
            if report.rank // layout.stage_size != stage:
                continue
            expected = HeldBytes(
                memory.weights_bytes, memory.gradients_bytes, optimizers[report.rank % layout.stage_size]
            )
            if report.held != expected:
                problems.append(f"rank {report.rank} holds {report.held}, the planner says {expected}")
    return problems


def _require_empty(out: Path) -> None:
    """What lies there would be taken for the rehearsal's, or be in its way after minutes."""
    found = min(out.iterdir(), default=None) if out.is_dir() else None
    if found is not None:
        raise ConfigError(
            f"out={out} is not empty: it has {found.name}.", f"Empty it, or give a new folder: out={out / 'rehearsal'}."
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made: {error.strerror}.", "Give out=FOLDER, a new folder in a place you may write to."
        ) from error


def _manifest(run: RunConfig, layout: Layout) -> Manifest:
    data = {"data": "none: a rehearsal", "tokenizer": "none: a rehearsal"}
    return Manifest(
        step=1, consumed_samples=run.step_sizes.samples(1), consumed_per_source={}, optimizer_step=1,
        run_id="rehearsal", identity=identity_of(run, data), config=config_to_dict(run), layout=layout.describe(),
        versions={name: version(name) for name in ("torch", "megatron-core", "deepspeed")}, files=[],
        tensor_names=stored_names(run.model),
    )  # fmt: skip


def _size_problems(run: RunConfig, checkpoint: CheckpointFiles) -> list[str]:
    """A tensor that nobody writes leaves no hole in a cover: the whole must be the model's size too."""
    shapes = logical_shapes(run.model)
    trained = trained_names(run.model, run.stage)
    sizes = {WEIGHT: trained if run.model.lora is not None else shapes.keys()}
    expected = {kind: sum(prod(shapes[name]) for name in sizes.get(kind, trained)) for kind in checkpoint.elements}
    return [
        f"the checkpoint's {kind} has {elements} elements, the model {expected[kind]}"
        for kind, elements in checkpoint.elements.items()
        if elements != expected[kind]
    ]
