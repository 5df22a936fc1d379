"""Whether a layout is legal, and if not, why. The trainer, the planner and the tests ask here. No torch.

There are two kinds of problems, because the planner also plans layouts that the trainer cannot run:

    arithmetic   something does not divide                        layout_problems
    support      possible, but not built or not proven here       support_problems

What depends on the kernel that a device gets (grouped_product_problems) is asked when the device is known.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from math import gcd, lcm

from gpt4moe.config.model import AttentionKind, MlpKind, ModelConfig, divisors
from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.config.step_sizes import LengthLevelConfig
from gpt4moe.config.training import TrainingConfig
from gpt4moe.errors import LayoutError, together
from gpt4moe.parallel.placement import stage_sizes

Sizes = Callable[[ModelConfig], dict[str, int]]
"""Key of the configuration -> a size that tp must divide."""


def _heads(model: ModelConfig) -> dict[str, int]:
    return {"model.num_attention_heads": model.num_attention_heads, "model.num_query_groups": model.query_groups}


def _dense_width(model: ModelConfig) -> dict[str, int]:
    return {"model.ffn_hidden_size": model.ffn_hidden_size} if model.ffn_hidden_size else {}


def _shared_width(model: ModelConfig) -> dict[str, int]:
    shared = model.moe.shared_expert_ffn_hidden_size if model.moe else None
    return {"model.moe.shared_expert_ffn_hidden_size": shared} if shared else {}


CUT_BY_ATTENTION: dict[AttentionKind, Sizes] = {AttentionKind.grouped_query: _heads, AttentionKind.latent: _heads}
CUT_BY_MLP: dict[MlpKind, Sizes] = {MlpKind.dense: _dense_width, MlpKind.moe: _shared_width}
_UNBUILT = {AttentionKind.latent: "model.mla"}
"""Attention that the planner counts and the trainer cannot build -> the key that asks for it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a layout is refused (cause), and what the user can do (cure)."""

    cause: str
    cure: str


def layout_problems(
    model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig, world_size: int
) -> list[Problem]:
    """Sizes that do not divide if `model` runs on `world_size` ranks. Empty: the arithmetic is legal."""
    grid = list(_grid_problems(parallel, world_size))
    if grid:
        return grid  # without a whole dp the other checks mean nothing
    return [
        *_batch_problems(parallel, training, world_size),
        *_ramp_problems(parallel, training, world_size),
        *_tensor_problems(model, parallel),
        *_length_problems(model, parallel, training),
        *_pipeline_problems(model, parallel, training, world_size),
        *_expert_problems(model, parallel, world_size),
    ]


def support_problems(model: ModelConfig, parallel: ParallelConfig) -> list[Problem]:
    """What the trainer cannot do on a layout whose arithmetic is legal."""
    planned = planned_parts(model)
    checks = [
        (bool(planned), f"{' and '.join(planned)}: the planner counts it, the trainer cannot build it.",
         "Choose a model without it: +experiment=gpt4, model=mixtral_8x7b, model=tiny."),
        (parallel.tp > 1 and not parallel.sequence_parallel_on,
         f"parallel.sequence_parallel=false with parallel.tp={parallel.tp}: every tensor-parallel rank would route the "
         "same tokens.", "Leave parallel.sequence_parallel unset: it is on when tp > 1."),
    ]  # fmt: skip
    return [Problem(cause, cure) for wrong, cause, cure in checks if wrong]


def grouped_product_problems(model: ModelConfig, parallel: ParallelConfig) -> list[Problem]:
    """Sizes that torch's grouped matrix product (kernels.experts=grouped_mm) refuses in the first layer.

    It takes matrices whose rows are a multiple of 16 bytes: 8 elements of bf16.
    """
    if model.moe is None:
        return []
    width = f"model.moe.ffn_hidden_size={model.moe.ffn_hidden_size}"
    if parallel.etp > 1:
        width = f"{width} / parallel.etp={parallel.etp}"
    sizes = {f"model.hidden_size={model.hidden_size}": model.hidden_size}
    sizes[width] = model.moe.ffn_hidden_size // parallel.etp
    if model.lora is not None:
        sizes[f"stage.lora.rank={model.lora.rank}"] = model.lora.rank
    return [
        Problem(
            f"{name} is no multiple of 8, but the grouped product of experts (kernels.experts=grouped_mm, or auto in "
            "bf16 on a GPU) takes rows of a multiple of 16 bytes.",
            "Change the size to a multiple of 8, or set kernels.experts=per_expert.",
        )
        for name, size in sizes.items()
        if size % 8
    ]


def planned_parts(model: ModelConfig) -> list[str]:
    """Those keys of a model, as KEY or KEY=VALUE, that only the planner knows (config.model.PlannedConfig)."""
    parts = sorted({_UNBUILT[kind.attention] for kind in model.layer_kinds if kind.attention in _UNBUILT})
    if model.planned is not None:
        values = {field.name: getattr(model.planned, field.name) for field in fields(model.planned)}
        parts += [f"model.planned.{name}={value}" for name, value in sorted(values.items()) if value]
    return parts


def require_legal(model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig, world_size: int) -> None:
    """Raises: LayoutError with all problems of arithmetic; if there are none, with all problems of support."""
    refuse(layout_problems(model, parallel, training, world_size) or support_problems(model, parallel))


def refuse(problems: list[Problem]) -> None:
    """Raises: LayoutError with all problems, if there are any."""
    if problems:
        raise together([LayoutError(problem.cause, problem.cure) for problem in problems])


def _grid_problems(parallel: ParallelConfig, world_size: int) -> Iterator[Problem]:
    size = parallel.tp * parallel.pp * parallel.cp
    if world_size % size:
        yield Problem(
            f"parallel.tp={parallel.tp} x pp={parallel.pp} x cp={parallel.cp} = {size} does not divide the "
            f"{world_size} rank{'s' * (world_size > 1)} of this run.",
            f"Start a multiple of {size} ranks, or choose degrees whose product is one of {divisors(world_size)}.",
        )


def _batch_problems(parallel: ParallelConfig, training: TrainingConfig, world_size: int) -> Iterator[Problem]:
    dp = world_size // (parallel.tp * parallel.pp * parallel.cp)
    micro, batch = training.micro_batch_size, training.global_batch_size
    if batch % (micro * dp):
        fits = [m for m in divisors(batch) if batch % (m * dp) == 0]
        cure = f"Set training.global_batch_size to a multiple of {micro * dp}"
        cure += f", or training.micro_batch_size to one of {fits}." if fits else "."
        yield Problem(
            f"training.global_batch_size={batch} is no multiple of micro_batch_size {micro} x dp {dp} "
            f"({world_size} ranks = tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} x dp {dp}).",
            cure,
        )


def _ramp_problems(parallel: ParallelConfig, training: TrainingConfig, world_size: int) -> Iterator[Problem]:
    """Every level needs whole micro-batches on every rank, at least one for each stage, in whole groups if vpp > 1."""
    dp = world_size // (parallel.tp * parallel.pp * parallel.cp)
    unit = training.micro_batch_size * dp * (parallel.pp if parallel.vpp > 1 else 1)
    least = training.micro_batch_size * dp * parallel.pp
    ramp = {f"training.batch_ramp[{at}]": level.global_batch_size for at, level in enumerate(training.batch_ramp)}
    levels = {_named(level): level.global_batch_size for level in training.length_ramp if level.global_batch_size}
    for name, size in (ramp | levels).items():
        if size % unit or size < least:
            fits = max(least, -(-size // unit) * unit)
            what = f"a multiple of {unit}" + (f", and at least {least}" if least > unit else "")
            yield Problem(
                f"{name}.global_batch_size={size} with micro_batch_size "
                f"{training.micro_batch_size} x dp {dp} gives a rank {size / (training.micro_batch_size * dp):g} "
                f"micro-batches, but parallel.pp={parallel.pp}, vpp={parallel.vpp} needs {what} sequences.",
                f"Set {name}.global_batch_size={fits}, or a smaller training.micro_batch_size."
                if fits < training.global_batch_size or name in levels
                else f"Leave the level out: {fits} would not be below training.global_batch_size="
                f"{training.global_batch_size}.",
            )


def _tensor_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    kinds, cut = dict.fromkeys(model.layer_kinds), dict[str, int]()
    for kind in kinds:
        cut |= CUT_BY_ATTENTION[kind.attention](model)
    cut_over_cp = f"(model.seq_length={model.seq_length} / parallel.cp={parallel.cp})"
    sequence = "model.seq_length" if parallel.cp == 1 else cut_over_cp
    cut |= {
        "model.vocab_size": model.vocab_size,
        sequence: model.seq_length // parallel.cp,  # sequence parallelism
        "model.hidden_size": model.hidden_size,
    }
    for kind in sorted(kinds, key=lambda kind: kind.has_experts):
        cut |= CUT_BY_MLP[kind.mlp](model)
    if model.vision is not None:
        cut["model.vision.ffn_hidden_size"] = model.vision.ffn_hidden_size
    uncut = [f"{name}={size}" for name, size in cut.items() if size % parallel.tp]
    if uncut:
        yield Problem(
            f"parallel.tp={parallel.tp} does not divide {' nor '.join(uncut)}.",
            f"Set parallel.tp to one of {divisors(gcd(*cut.values()))}, or change the model.",
        )
    if model.seq_length % (2 * parallel.cp) and parallel.cp > 1:
        yield Problem(
            f"parallel.cp={parallel.cp} needs model.seq_length={model.seq_length} to divide by {2 * parallel.cp}.",
            f"Set model.seq_length to a multiple of {2 * parallel.cp}.",
        )


def _length_problems(model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig) -> Iterator[Problem]:
    """Samples of every length are cut over cp into two pieces a rank, and each rank's part over tp."""
    unit = lcm(2 * parallel.cp if parallel.cp > 1 else 1, parallel.cp * parallel.tp)
    fits = [size for size in divisors(model.seq_length) if size % unit == 0 and size < model.seq_length]
    for level in training.length_ramp:
        if level.seq_length % unit:
            yield Problem(
                f"{_named(level)}.seq_length={level.seq_length} does not divide by {unit}, which parallel.cp="
                f"{parallel.cp} and tp={parallel.tp} need.",
                f"Set it to one of {fits}, or choose less cp or tp." if fits else "Choose less cp or tp.",
            )


def _named(level: LengthLevelConfig) -> str:
    """By its last step: levels that are over do not count any more (TrainingConfig.after)."""
    return f"training.length_ramp[until_step={level.until_step}]"


def _pipeline_problems(
    model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig, world_size: int
) -> Iterator[Problem]:
    chunks = parallel.pp * parallel.vpp
    name = f"parallel.pp={parallel.pp} x vpp={parallel.vpp} = {chunks} stages"
    if parallel.vpp > 1 and parallel.pp == 1:
        yield Problem(f"parallel.vpp={parallel.vpp} needs a pipeline, but parallel.pp=1.", "Set parallel.vpp=1.")
        return
    if chunks > model.num_layers:
        yield Problem(
            f"{name} for model.num_layers={model.num_layers}: some would be empty.",
            f"Set parallel.pp x vpp to {model.num_layers} or less.",
        )
        return
    if parallel.layers_per_stage is not None:
        listed = parallel.layers_per_stage
        if len(listed) != chunks or sum(listed) != model.num_layers or min(listed) < 1:
            yield Problem(
                f"parallel.layers_per_stage={listed} ({len(listed)} stages, {sum(listed)} layers) does not describe "
                f"{name} and model.num_layers={model.num_layers}.",
                f"Give {chunks} numbers of 1 or more that sum to {model.num_layers}, e.g. "
                f"{stage_sizes(model.num_layers, ParallelConfig(pp=chunks))}, or null.",
            )
    elif min(sizes := stage_sizes(model.num_layers, parallel)) < 1:
        yield Problem(
            f"{name} for model.num_layers={model.num_layers} with "
            f"parallel.embedding_counts_as_layer={parallel.embedding_counts_as_layer} and "
            f"head_counts_as_layer={parallel.head_counts_as_layer} have {sizes} layers: some are empty.",
            "Set both to false, or parallel.pp x vpp lower.",
        )
    dp = world_size // (parallel.tp * parallel.pp * parallel.cp)
    micro_batches = training.global_batch_size // (training.micro_batch_size * dp)
    if parallel.vpp > 1 and micro_batches % parallel.pp:
        yield Problem(
            f"The interleaved schedule (vpp={parallel.vpp}) walks micro-batches in groups of parallel.pp={parallel.pp},"
            f" but a rank has {micro_batches} (global batch {training.global_batch_size} / micro-batch "
            f"{training.micro_batch_size} / dp {dp}).",
            f"Set training.global_batch_size to a multiple of {training.micro_batch_size * dp * parallel.pp}.",
        )


def _expert_problems(model: ModelConfig, parallel: ParallelConfig, world_size: int) -> Iterator[Problem]:
    experts = parallel.ep * parallel.etp
    stage = world_size // parallel.pp
    if model.moe is None:
        if experts > 1:
            yield Problem(
                f"parallel.ep={parallel.ep} x etp={parallel.etp}, but model.moe is null: there are no experts.",
                "Set parallel.ep=1 and parallel.etp=1.",
            )
        if parallel.recompute is Recompute.moe:
            yield Problem(
                "parallel.recompute=moe, but model.moe is null: 0 layers have experts.",
                "Set parallel.recompute=none, selective or full.",
            )
        return
    if stage % experts:
        dp = stage // (parallel.tp * parallel.cp)
        fits = [d for d in divisors(stage) if model.moe.num_experts % d == 0]
        yield Problem(
            f"parallel.ep={parallel.ep} x etp={parallel.etp} does not divide tp x cp x dp = {stage} "
            f"({world_size} ranks = tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} x dp {dp}).",
            f"Set parallel.etp=1 and parallel.ep to one of {fits}, or change the number of ranks.",
        )
    if model.moe.num_experts % parallel.ep:
        yield Problem(
            f"parallel.ep={parallel.ep} does not divide model.moe.num_experts={model.moe.num_experts}.",
            f"Set parallel.ep to one of {divisors(model.moe.num_experts)}.",
        )
    if model.moe.ffn_hidden_size % parallel.etp:
        yield Problem(
            f"parallel.etp={parallel.etp} does not divide model.moe.ffn_hidden_size={model.moe.ffn_hidden_size}.",
            "Set parallel.etp=1.",
        )
