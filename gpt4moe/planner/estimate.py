"""The plan of one run on one layout: parameters, FLOP, memory, time, money, and the bottleneck.

PlanConfig + devices -> count, flops, memory, step_time, run_time -> Estimate -> JSON, tables, a page
"""

from dataclasses import dataclass, replace

from gpt4moe.architecture.count import ParameterCount, RankParameters, count_parameters, rank_parameters
from gpt4moe.architecture.flops import FlopsPerToken, flops_per_token
from gpt4moe.architecture.image_flops import ImageFlops, encoder_parameters, image_flops
from gpt4moe.config.cluster import ClusterConfig
from gpt4moe.config.plan import PlanConfig, images_per_sequence
from gpt4moe.parallel.kernel_problems import DeviceKind, kernel_problems
from gpt4moe.parallel.layout import Layout, fewest_ranks
from gpt4moe.parallel.legality import support_problems
from gpt4moe.planner.checkpoint_size import saved_bytes, state_bytes
from gpt4moe.planner.diagnosis import binding, require_legal, warnings
from gpt4moe.planner.efficiency import ErrorInterval
from gpt4moe.planner.memory import StageMemory, memory_per_stage
from gpt4moe.planner.phases import RunPhase, timed_phases
from gpt4moe.planner.run_time import Cost, RunTime, Saving, cost, save_seconds
from gpt4moe.planner.stacks import (
    efficiency_of,
    gradient_bytes,
    moment_bytes,
    plan_interval,
    products_peak,
    unbuilt,
)
from gpt4moe.planner.states import trained_tensors
from gpt4moe.planner.step_time import StepTime, step_time
from gpt4moe.planner.upkeep import Upkeep, upkeep
from gpt4moe.planner.work import TimedKind, Work, busiest_rows, timed_kinds


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """All numbers of one plan. Units: FLOP, bytes, seconds, days, USD, kWh."""

    plan: PlanConfig
    layout: Layout
    parameters: ParameterCount
    flops: FlopsPerToken
    images: ImageFlops | None
    """Of one sequence; None: a text model. MFU leaves them out, as training's does."""
    memory: list[StageMemory]
    """Of the steps that need most."""
    step: StepTime
    """Of training.global_batch_size and model.seq_length, which ramps end with."""
    run: RunTime
    phases: list[RunPhase]
    """One where neither the batch, the length of samples nor the shares of the data change."""
    cost: Cost
    bottleneck: str
    warnings: list[str]
    unbuilt: list[str]
    """Why the trainer cannot build it; empty: it can."""

    @property
    def rank_parameters(self) -> list[RankParameters]:
        """Parameters of one rank of each pipeline stage: [pp]."""
        return [rank_parameters(self.plan.model, self.plan.parallel, stage) for stage in range(self.layout.pp)]

    @property
    def encoder_parameters(self) -> int:
        """Of the frozen encoder of a vision model, which is beside the model; 0 of a text model."""
        vision = self.plan.model.vision
        return encoder_parameters(vision.encoder) if vision is not None else 0

    @property
    def tokens_per_step(self) -> int:
        return self.plan.training.global_batch_size * self.plan.model.seq_length

    @property
    def tokens(self) -> int:
        return self.plan.step_sizes.tokens(self.plan.training.steps)

    def total_flops(self, kind: str) -> float:
        """Of the whole run. Args: kind: a field of FlopsPerToken."""
        return float(sum(getattr(phase.flops, kind) * phase.tokens for phase in self.phases))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs (attention included, recomputation excluded) over the dense peak of the products; 0 to 1."""
        peak = products_peak(self.plan) * self.layout.world_size
        return self.flops.model * self.tokens_per_second / peak

    @property
    def interval(self) -> ErrorInterval | None:
        """How far off the time of a step is for published runs, and with it days and dollars; None: not known."""
        return plan_interval(self.plan)

    def likely(self, predicted: float | None) -> tuple[float, float] | None:
        """The range of a time or a cost of this plan by that interval; None: not known."""
        return None if self.interval is None or predicted is None else self.interval.around(predicted)

    @property
    def days(self) -> float:
        return self.run.seconds / 86400

    @property
    def upkeep(self) -> Upkeep:
        """Storage, data, network and carbon of the run."""
        return upkeep(
            self.plan, timed_work(self.plan), self.layout, step_seconds=self.step.seconds, tokens=self.tokens,
            kwh=self.cost.kwh,
        )  # fmt: skip

    @property
    def peak_memory_bytes(self) -> int:
        return _fullest(self.memory)

    def phase_usd(self, phase: RunPhase) -> float | None:
        """Its share of the cost; None: the cluster has no price."""
        return None if self.cost.usd is None else self.cost.usd * phase.seconds / self.run.seconds

    @property
    def headroom_bytes(self) -> float:
        """Device memory minus the memory of the fullest stage; below 0 the plan does not fit."""
        return self.plan.cluster.memory_bytes - self.peak_memory_bytes


def world_of(plan: PlanConfig) -> int:
    """Number of devices: plan.gpus, else cluster.devices, else the fewest that the layout needs."""
    return plan.gpus or plan.cluster.devices or fewest_ranks(plan.parallel)


def timed_work(plan: PlanConfig, kinds: list[TimedKind] | None = None) -> Work:
    """The input of layer_time and step_time.

    Args:
        kinds: the result of timed_kinds(plan.model, trained_tensors(plan)), if the caller has it.
    """
    trained = trained_tensors(plan)
    cluster, efficiency = _slowed(plan.cluster, plan.time_factor), efficiency_of(plan)
    return Work(
        model=plan.model,
        kinds=kinds or timed_kinds(plan.model, trained),
        parallel=plan.parallel,
        micro_batch_size=plan.training.micro_batch_size,
        cluster=cluster,
        efficiency=replace(efficiency, moe_layer_seconds=plan.time_factor * efficiency.moe_layer_seconds),
        matrix_peak=products_peak(plan) / plan.time_factor,
        imbalance=busiest_rows(plan.model, plan.imbalance, plan.parallel.ep),
        value_bytes=2 if plan.precision.dtype.value == "bf16" else 4,
        images=images_per_sequence(plan),
        trained=trained,
        modules=frozenset(plan.beyond.recompute),
        gradient_bytes=gradient_bytes(plan),
        moment_bytes=moment_bytes(plan),
        offloads=plan.engine.offload_optimizer,
    )


def _slowed(cluster: ClusterConfig, factor: float) -> ClusterConfig:
    """A cluster on which every product, copy and message takes `factor` times as long."""
    return replace(
        cluster,
        peak_flops_bf16=cluster.peak_flops_bf16 / factor,
        peak_flops_fp32=cluster.peak_flops_fp32 / factor,
        memory_bytes_per_second=cluster.memory_bytes_per_second / factor,
        nvlink_bytes_per_second=cluster.nvlink_bytes_per_second / factor,
        fabric_bytes_per_second=cluster.fabric_bytes_per_second / factor,
    )


def estimate(plan: PlanConfig) -> Estimate:
    """The plan of a run on its layout.

    A plan that the trainer cannot run, or that does not fit in memory, gets a warning and no error.

    Raises: LayoutError if the degrees do not divide what they must; ConfigError if the run would never end.
    """
    world = world_of(plan)
    require_legal(plan, world)
    work = timed_work(plan)
    layout = Layout.from_config(plan.parallel, world)
    step = step_time(work, plan.training, world)
    is_async, saved = plan.checkpoint.asynchronous, saved_bytes(work, world)
    saving = Saving(
        every_steps=plan.checkpoint.every,
        seconds=save_seconds(saved, asynchronous=is_async),
        written_seconds=save_seconds(saved, asynchronous=False) if is_async else 0.0,
    )
    hours_between = plan.cluster.hours_between_failures
    memories: dict[tuple[int, int], list[StageMemory]] = {}

    def memory_of(part: PlanConfig) -> list[StageMemory]:
        size = (part.model.seq_length, part.training.global_batch_size)
        if size not in memories:
            memories[size] = memory_per_stage(part, layout, imbalance=plan.imbalance)
        return memories[size]

    def seconds_of(part: PlanConfig) -> float:
        of_part = work if part.model.seq_length == plan.model.seq_length else timed_work(part)
        return step_time(of_part, part.training, world).seconds

    whole, phases = timed_phases(
        plan, seconds_of, lambda part: _fullest(memory_of(part)), saving,
        failures_per_hour=world / hours_between if hours_between else 0.0,
        restart_seconds=60 * plan.restart_minutes, detect_seconds=plan.detect_seconds,
    )  # fmt: skip
    memory = max((memory_of(plan), *memories.values()), key=_fullest)
    refused = [
        *support_problems(plan.model, plan.parallel),
        *kernel_problems(plan, DeviceKind.of_cluster(plan.cluster)),
    ]
    beyond = [f"{setting}: the planner counts it, the trainer cannot build it" for setting in unbuilt(plan)]
    unsupported = [*beyond, *(problem.cause for problem in refused)]
    return Estimate(
        plan=plan, layout=layout, parameters=count_parameters(plan.model),
        flops=flops_per_token(plan.model, plan.parallel, trained=work.trained), images=_images(work),
        memory=memory, step=step, run=whole, phases=phases,
        cost=cost(plan.cluster, world, whole.seconds / 3600), unbuilt=unsupported,
        bottleneck=binding(plan, step, memory),
        warnings=warnings(plan, memory, saving, whole, unsupported, step=step,
                          offloaded_bytes=state_bytes(work, world) * min(world, plan.cluster.devices_per_node)),
    )  # fmt: skip


def _images(work: Work) -> ImageFlops | None:
    return image_flops(work.model, work.images, work.trained) if work.model.vision is not None else None


def _fullest(memory: list[StageMemory]) -> int:
    return max(stage.total_bytes for stage in memory)
