"""PipelinePlan: one step of a model's pipeline on a time axis, with its idle time and the activations it holds.

    layers -> stages -> FLOP of each -> pipeline.schedule.simulate -> PipelinePlan (pages.schedule_page shows it)

Times are relative: 1 is the forward pass of an average stage. A stage's time is proportional to its FLOP, so the output
layer makes the last stage slower; the embedding's look-up takes no time.
"""

from dataclasses import dataclass

from gpt4moe.architecture.count import active_size, chunk_tensors
from gpt4moe.architecture.flops import attention_flops, flops_per_token
from gpt4moe.architecture.rows import Component
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.layout import fewest_ranks
from gpt4moe.parallel.legality import layout_problems, refuse
from gpt4moe.parallel.placement import stage_layers
from gpt4moe.pipeline.message_check import message_problems
from gpt4moe.pipeline.messages import programs
from gpt4moe.pipeline.schedule import Timeline, bubble_share, peak_live, schedule, simulate


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelinePlan:
    """One step of a pipeline."""

    vpp: int
    micro_batches: int
    """Of one data-parallel rank."""
    stage_layers: list[list[int]]
    """Global layer indices of the pp * vpp stages."""
    timeline: Timeline
    bubble_share: float
    """Idle over computing time, all ranks."""
    live: list[float]
    """The most micro-batches, chunk by chunk, whose activations each rank holds at once."""
    live_layers: list[float]
    """The same in layers: what a rank's activation memory is proportional to."""

    @property
    def pp(self) -> int:
        return len(self.timeline.table)


def run_pipeline(run: RunConfig, world_size: int | None = None) -> PipelinePlan:
    """The step of a run on `world_size` ranks; on the fewest that hold its layout by default. Raises: LayoutError."""
    parallel = run.parallel
    world_size = world_size or fewest_ranks(parallel)
    refuse(layout_problems(run.model, parallel, run.training, world_size))
    ranks_of_data = world_size // (parallel.pp * parallel.tp * parallel.cp)
    micro_batches = run.training.global_batch_size // (run.training.micro_batch_size * ranks_of_data)
    return pipeline_plan(run.model, parallel, micro_batches)


def checked_messages(plan: PipelinePlan) -> list[str]:
    """Problems of the messages between its stages; empty: every send meets its receive."""
    return message_problems(programs(pp=plan.pp, vpp=plan.vpp, micro_batches=plan.micro_batches), plan.vpp)


def pipeline_plan(model: ModelConfig, parallel: ParallelConfig, micro_batches: int) -> PipelinePlan:
    """The step of a model on legal degrees (parallel.legality). Raises: LayoutError for a refused schedule."""
    table = schedule(pp=parallel.pp, vpp=parallel.vpp, micro_batches=micro_batches)
    forward = relative_durations(model, parallel)
    backward = [seconds * backward_ratio(model, parallel) for seconds in forward]
    timeline = simulate(table, forward=forward, backward=backward)
    layers = stage_layers(model.num_layers, parallel)
    return PipelinePlan(
        vpp=parallel.vpp,
        micro_batches=micro_batches,
        stage_layers=layers,
        timeline=timeline,
        bubble_share=bubble_share(timeline),
        live=peak_live(table),
        live_layers=peak_live(table, [len(stage) for stage in layers]),
    )


def relative_durations(model: ModelConfig, parallel: ParallelConfig) -> list[float]:
    """Forward pass of each of the pp * vpp stages by its FLOP; their mean is 1."""
    flops = [0.0] * (parallel.pp * parallel.vpp)
    per_layer = attention_flops(model) / model.num_layers
    for rank in range(parallel.pp):
        for chunk, tensors in enumerate(chunk_tensors(model, parallel, rank)[: parallel.vpp]):
            flops[chunk * parallel.pp + rank] = sum(
                2.0 * active_size(model, tensor)
                for tensor in tensors
                if tensor.is_matrix and tensor.component is not Component.output_layer
            )
    for stage, layers in enumerate(stage_layers(model.num_layers, parallel)):
        flops[stage] += per_layer * len(layers)
    flops[-1] += 2.0 * model.vocab_size * model.hidden_size  # a tied output layer multiplies too
    mean = sum(flops) / len(flops)
    return [value / mean for value in flops]


def backward_ratio(model: ModelConfig, parallel: ParallelConfig) -> float:
    """Backward over forward time: 2, and what is computed again."""
    flops = flops_per_token(model, parallel)
    return 2.0 + 3.0 * flops.recompute / flops.model
