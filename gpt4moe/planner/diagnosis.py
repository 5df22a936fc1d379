"""Diagnosis of a plan: changes that make an illegal layout legal, the bottleneck, warnings.

an illegal plan -> other values of each key, nearest first --legality--> "gpus=960, parallel.tp=8 or ..."
a legal plan    -> binding: the bottleneck in one sentence; warnings: what does not fit, what is assumed
"""

from collections.abc import Iterator
from copy import deepcopy
from math import ceil

from gpt4moe.config.beyond import Dispatch
from gpt4moe.config.cluster import Generation
from gpt4moe.config.model import divisors
from gpt4moe.config.optimizer import Dtype
from gpt4moe.config.parallel import Recompute
from gpt4moe.config.plan import DEFAULT_STEPS, PlanConfig
from gpt4moe.errors import LayoutError
from gpt4moe.parallel.layout import fewest_ranks
from gpt4moe.parallel.legality import layout_problems, refuse
from gpt4moe.parallel.placement import stage_sizes
from gpt4moe.planner.checkpoint_size import checkpoint_bytes
from gpt4moe.planner.efficiency import generation_timing
from gpt4moe.planner.memory import StageMemory
from gpt4moe.planner.run_time import STORAGE_RATE, RunTime, Saving, best_interval
from gpt4moe.planner.stacks import STACKS, moment_bytes, plan_interval
from gpt4moe.planner.states import trained_tensors
from gpt4moe.planner.step_time import StepTime

MOVES = {
    "products": ("matrix units", "faster devices, or larger products: less tp and ep, a larger micro-batch"),
    "attention": ("matrix units", "shorter sequences, fewer heads, or faster devices"),
    "elementwise": ("device memory bandwidth", "fused kernels, more memory bandwidth, a smaller top_k"),
    "tp": ("link of the tensor-parallel group", "less tp (more pp), tp within an NVLink domain, overlap"),
    "cp": ("link of the context-parallel group", "less cp, overlap"),
    "ep": ("link of the expert-parallel group", "ep within an NVLink domain, less etp, overlap of the all-to-all"),
    "images": ("encoder and resampler, beside the schedule", "fewer or smaller images, a smaller encoder, less cp"),
    "pp": ("fabric between stages", "less vpp, a faster fabric"),
    "bubble": ("idle pipeline", "more micro-batches (a larger global batch, less dp), more vpp, less pp"),
    "dp": ("fabric between data-parallel ranks", "more micro-batches a step, more vpp, a faster fabric"),
    "optimizer": ("device memory bandwidth", "a larger global batch"),
}
"""Part of a step -> (the resource that limits it, changes that would make it faster)."""
OFFLOAD_SLOWER = (1.9, 4.2)
"""Seconds of a step over those without offload, of a quarter and of all states: Megatron-Bridge
docs/training/cpu-offloading.md at 6608201d7, Qwen3-30B-A3B, tp 2, pp 2, ep 4."""
TIGHT = 0.95
"""A plan that takes at least this share of the device's memory is called tight."""
FURTHEST = 64
"""For a key without an upper bound: how many multiples below and above its value are tried."""


def binding(plan: PlanConfig, step: StepTime, memory: list[StageMemory]) -> str:
    """The bottleneck in one sentence: resource, share of the step, cures. Memory, if the plan does not fit."""
    fullest = max(memory, key=lambda stage: stage.total_bytes)
    if fullest.total_bytes > plan.cluster.memory_bytes:
        return (
            f"memory: stage {fullest.stage} needs {fullest.total_bytes / 1e9:.1f} GB of "
            f"{plan.cluster.memory_bytes / 1e9:.1f}; {_memory_move(plan, fullest)} would move it"
        )
    ranked = sorted(step.parts, key=step.parts.__getitem__, reverse=True)
    words = [f"{part} {step.parts[part] / step.seconds:.0%} of the step ({MOVES[part][0]})" for part in ranked[:2]]
    second = "" if ranked[0] != "products" else f"; the next, {words[1]}: {MOVES[ranked[1]][1]}"
    return f"{words[0]}: {MOVES[ranked[0]][1]}{second}"


def warnings(
    plan: PlanConfig,
    memory: list[StageMemory],
    saving: Saving,
    whole: RunTime,
    unsupported: list[str],
    *,
    step: StepTime,
    offloaded_bytes: float,
) -> list[str]:
    """Warnings: what the trainer cannot run, what does not fit, what failures cost, how reliable the time is.

    Args:
        offloaded_bytes: masters and moments of a node's devices, if they are in host memory.
    """
    cluster = plan.cluster
    found = [f"the trainer cannot run this yet: {cause}" for cause in unsupported]
    found += [f"the trainer refuses such a run: {cause}" for cause in plan.data_refusals]
    if cluster.generation.is_amd:
        found.append(f"cluster={cluster.name} is AMD's: nothing of this trainer has ever run on ROCm")
    again, cut = plan.parallel.recompute_layers, plan.parallel
    most = max(stage_sizes(plan.model.num_layers, cut))
    if again is not None and again > most:
        found.append(f"parallel.recompute_layers={again}, but a virtual stage has {most} at most: all are recomputed")
    fullest = max(memory, key=lambda stage: stage.total_bytes)
    share = fullest.total_bytes / cluster.memory_bytes
    if share > 1:
        found.append(
            f"does not fit: stage {fullest.stage} needs {fullest.total_bytes / 1e9:.1f} GB, {cluster.name} has "
            f"{cluster.memory_bytes / 1e9:.1f} GB; {_memory_move(plan, fullest)} would help, or search=true"
        )
    elif share > TIGHT:
        found.append(f"memory is tight: stage {fullest.stage} takes {share:.0%} of the device")
    between = saving.every_steps * step.seconds
    if 0 < between < saving.written_seconds:
        found.append(
            f"a save takes {saving.written_seconds:.3g} s to reach storage at {STORAGE_RATE / 1e9:g} GB/s a device, "
            f"the next one comes after {between:.3g} s and waits: set checkpoint.every="
            f"{ceil(saving.written_seconds / step.seconds)} or more"
        )
    lost = whole.failure_seconds * plan.training.steps / whole.seconds
    if lost > 0.1:
        rate = whole.failures / whole.seconds
        work = (whole.seconds - lost * whole.seconds) / plan.training.steps
        found.append(_of_failures(plan, saving, whole, lost, best_interval(saving.seconds, rate, work), work))
    if plan.engine.offload_optimizer:
        found.append(_of_offload(plan, step, offloaded_bytes))
    if plan.beyond.dispatch is Dispatch.overlapped and step.micro_batches == 1:
        found.append("beyond.dispatch=overlapped hides nothing: a step has one micro-batch; take a larger batch")
    if plan.training.steps == DEFAULT_STEPS and plan.tokens is None and not plan.has_steps:
        found.append(
            f"days and cost are of {DEFAULT_STEPS:,} steps, a plan's default, or "
            f"{plan.step_sizes.tokens(DEFAULT_STEPS):.3g} tokens: set tokens=... or training.steps=..."
        )
    if cluster.usd_per_hour is None:
        found.append(f"the cost is not known: cluster={cluster.name} has no price; set cluster.usd_per_hour=...")
    found.append(_of_time(plan))
    if plan.time_factor != 1:
        found.append(f"every step is taken {plan.time_factor:g} times as long as those constants say: time_factor")
    return found


def _of_failures(plan: PlanConfig, saving: Saving, whole: RunTime, lost: float, best: int, step_seconds: float) -> str:
    """What stops cost, and the interval between saves that loses least, if each is written before the next one is due.

    Args:
        lost: share of the time.
        best: steps between saves, by what a save keeps training waiting.
    """
    whole_bytes = checkpoint_bytes(plan.model, trained_tensors(plan), moment_bytes=moment_bytes(plan))
    every = max(best, ceil(saving.written_seconds / step_seconds))
    stops = f"{lost:.0%} of the time goes to {whole.failures:.0f} unexpected stops"
    if not saving.every_steps:
        return f"{stops}, and nothing is saved before the end: set checkpoint.every={every}"
    then, now = (whole_bytes / (steps * step_seconds) / 1e9 for steps in (every, saving.every_steps))
    return (
        f"{stops}; the interval that loses the least is checkpoint.every={every}, if storage takes the "
        f"{whole_bytes / 1e12:.3g} TB of a save at {then:,.3g} GB/s; now it has to take {now:,.3g} GB/s"
    )


def _of_offload(plan: PlanConfig, step: StepTime, node_bytes: float) -> str:
    least, most = OFFLOAD_SLOWER
    return (
        f"the offloaded update is {step.parts['optimizer']:.3g} of a step's {step.seconds:.3g} s by assumed rates of "
        f"the host, nothing hidden (Megatron-Bridge's steps took {most:g} times as long, {least:g} with a quarter "
        f"offloaded); it takes {node_bytes / 1e9:,.0f} GB of a node's host memory"
    )


def _of_time(plan: PlanConfig) -> str:
    """Which constants the time comes from, and their error. No run of this trainer on a GPU has been timed."""
    cluster = plan.cluster
    known, seen = generation_timing(cluster.generation), plan_interval(plan)
    if cluster.generation is Generation.cpu:
        return f"FLOP/s, bandwidths and price of cluster={cluster.name} are nominal: its time and cost are only a trend"
    error = "no published row on it was found, so how far off that is is not known"
    if plan.time_factor != 1:
        error = "the errors of published rows are of those constants alone, without time_factor"
    elif plan.precision.dtype is Dtype.fp32:
        error = "no published row in fp32 was found, so how far off that is is not known"
    elif seen is not None:
        side = "some too fast, some too slow" if seen.least < 0 < seen.most else "all too fast"
        side = "all too slow" if seen.least > 0 else side
        whose = "another source's constants" if plan.stack is None else "the others' constants"
        error = (
            f"{seen.rows} published rows ({seen.of}), predicted by {whose}, are {seen.least:+.0%} "
            f"to {seen.most:+.0%} off (docs/planner-error.md), {side}"
        )
    if plan.stack is not None:
        stack = STACKS[plan.stack]
        return (
            f"time and memory are those of stack={plan.stack}, {stack.release} ({stack.source}), not this trainer's; "
            f"later releases are faster; {error}"
        )
    return (
        f"no run of this trainer on a GPU has been timed; time on {cluster.generation.value} takes constants "
        f"{known.constants}; {error}"
    )


def _memory_move(plan: PlanConfig, stage: StageMemory) -> str:
    """Changes that this plan may take."""
    if stage.activations_bytes <= stage.states_bytes:
        return "more parallel.ep or parallel.pp, more devices for the optimizer's share"
    again = plan.parallel.recompute is not Recompute.full or plan.parallel.recompute_layers is not None
    moves = {
        "parallel.recompute=full": again and plan.beyond.dispatch is not Dispatch.overlapped,
        "a smaller training.micro_batch_size": plan.training.micro_batch_size > 1,
        "more parallel.tp": True,
    }
    return ", ".join(move for move, may in moves.items() if may)


def require_legal(plan: PlanConfig, world: int) -> None:
    """Raises: LayoutError with every problem. Its cure lists single changes; each was tried and is legal."""
    problems = layout_problems(plan.model, plan.parallel, plan.training, world)
    if not problems:
        return
    without_ramp = plan.training.of_one_size(plan.training.global_batch_size)
    is_of_ramp = not layout_problems(plan.model, plan.parallel, without_ramp, world)  # its own cure is the nearest
    changes = [] if is_of_ramp else legal_changes(plan, world)
    if not changes:
        refuse(problems)
    causes = " ".join(problem.cause for problem in problems)
    raise LayoutError(causes, f"Set {'one of ' * (len(changes) > 1)}{', '.join(changes)}.")


def legal_changes(plan: PlanConfig, world: int) -> list[str]:
    """Overrides, each of which alone makes the plan legal: for each key its nearest legal value."""
    found = []
    for key, values in _others(plan, world):
        now = world if key == "gpus" else _value(plan, key)
        for value in sorted(values, key=lambda value: (abs(value - now), value)):
            if value != now and value > 0 and _is_legal(plan, world, key, value):
                found.append(f"{key}={value}")
                break
    return found


def _others(plan: PlanConfig, world: int) -> Iterator[tuple[str, list[int]]]:
    model, parallel, training = plan.model, plan.parallel, plan.training
    yield "gpus", _multiples(fewest_ranks(parallel), world)
    yield "parallel.tp", divisors(model.num_attention_heads)
    yield "parallel.pp", list(range(1, model.num_layers + 1))
    yield "parallel.vpp", divisors(model.num_layers)
    yield "parallel.cp", [2**power for power in range(8)]
    yield "parallel.ep", divisors(model.moe.num_experts) if model.moe else [1]
    yield "parallel.etp", [1, 2, 4, 8]
    dp = max(1, world // (parallel.tp * parallel.pp * parallel.cp))
    group = dp * training.micro_batch_size * (parallel.pp if parallel.vpp > 1 else 1)
    yield "training.global_batch_size", _multiples(group, training.global_batch_size)
    yield "training.micro_batch_size", divisors(training.global_batch_size)


def _multiples(of: int, near: int) -> list[int]:
    middle = near // of
    return [of * count for count in range(max(1, middle - FURTHEST), middle + FURTHEST + 1)]


def _value(plan: PlanConfig, key: str) -> int:
    group, name = key.split(".")
    value: int = getattr(getattr(plan, group), name)
    return value


def _is_legal(plan: PlanConfig, world: int, key: str, value: int) -> bool:
    if key == "gpus":
        return not layout_problems(plan.model, plan.parallel, plan.training, value)
    tried = deepcopy(plan)
    group, name = key.split(".")
    setattr(getattr(tried, group), name, value)
    return not layout_problems(tried.model, tried.parallel, tried.training, world)
