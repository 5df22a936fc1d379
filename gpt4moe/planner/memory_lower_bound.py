"""A lower bound on memory. It prunes the search without losing a layout that fits.

    each stage: states without padding + what its layers keep when the warm-up ends + one layer's workspace and what
    is restored of it, as if every layer were of the kind that needs least
    -> the fullest stage -> a lower bound -> may the layout fit, and with how few recomputed layers

The bound never exceeds memory.memory_per_stage (tests draw random layouts) and is much faster to compute.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.config.plan import PlanConfig
from gpt4moe.config.training import TrainingConfig
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.placement import stage_sizes
from gpt4moe.pipeline.schedule import warmup_forwards
from gpt4moe.planner.activations import layer_bytes
from gpt4moe.planner.memory import layer_workspace, reserve_bytes
from gpt4moe.planner.micro_batch import MicroBatch
from gpt4moe.planner.stacks import gradient_bytes, gradient_shares, has_one_fp8_weight
from gpt4moe.planner.states import VALUE_BYTES, freezes, owned_bytes
from gpt4moe.planner.step_time import stage_parameters
from gpt4moe.planner.work import Work


@dataclass(frozen=True, slots=True)
class StageStates:
    """Pipeline stages that are alike: the first of them, which has the most live activations."""

    stage: int
    states_bytes: float
    layers: tuple[int, ...]
    """Of each of its virtual stages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeastBytes:
    """Bytes of one layer and micro-batch, each of the kind of layer that needs least."""

    kept: int
    """Activations, until the backward pass."""
    restored: int
    """Activations that the backward pass computes again."""
    workspace: int


@dataclass(frozen=True, slots=True)
class MemoryLowerBound:
    """The bound for many layouts of one plan; it keeps what they share. Layers are spread over stages as evenly as
    possible, so layers_per_stage of a layout is ignored."""

    plan: PlanConfig
    work: Work
    gpus: int
    sizes: dict[tuple[int, ...], list[tuple[float, float]]] = field(default_factory=dict)
    stages: dict[tuple[int, ...], list[StageStates]] = field(default_factory=dict)
    layers: dict[tuple[int | Recompute, ...], LeastBytes] = field(default_factory=dict)
    live: dict[tuple[int, ...], list[tuple[StageStates, dict[int, int]]]] = field(default_factory=dict)

    def parameters(self, cut: ParallelConfig) -> list[tuple[float, float]]:
        """(dense, expert) parameters of a rank of each stage: [pp]."""
        key = (cut.tp, cut.pp, cut.vpp, cut.ep, cut.etp)
        if key not in self.sizes:
            self.sizes[key] = stage_parameters(replace(self.work, parallel=cut))
        return self.sizes[key]

    def may_fit(self, cut: ParallelConfig, training: TrainingConfig, recompute: Recompute = Recompute.none) -> bool:
        """False: the layout cannot fit, even with this recomputation of all layers in place of its own."""
        return self._fullest(cut, training, recompute)(None) <= self.plan.cluster.memory_bytes

    def states_may_fit(self, cut: ParallelConfig) -> bool:
        """False: the layout cannot fit, whatever the micro-batch and recomputation."""
        most = max(stage.states_bytes for stage in self._stages(cut))
        return most + reserve_bytes(self.plan, 0) <= self.plan.cluster.memory_bytes

    def least_bytes(self, cut: ParallelConfig, training: TrainingConfig) -> float:
        """Bytes: at most what the fullest rank needs by memory.memory_per_stage."""
        return self._fullest(cut, training, cut.recompute)(cut.recompute_layers)

    def fewest_recomputed(self, cut: ParallelConfig, training: TrainingConfig) -> ParallelConfig | None:
        """The layout with full recomputation of the fewest layers that may make it fit; None: it cannot fit."""
        counts, fullest = range(1, most_layers(self.plan, cut) + 1), self._fullest(cut, training, Recompute.full)
        first = bisect_left(counts, True, key=lambda count: fullest(count) <= self.plan.cluster.memory_bytes)
        return with_recomputed_layers(self.plan, cut, counts[first]) if first < len(counts) else None

    def _fullest(
        self, cut: ParallelConfig, training: TrainingConfig, recompute: Recompute
    ) -> Callable[[int | None], float]:
        """Recomputed layers of each virtual stage (None: all) -> a lower bound of the fullest rank's bytes."""
        whole, again = self._least(cut, training, Recompute.none), self._least(cut, training, recompute)
        stages = self._live(cut, training)

        def fullest(recomputed_layers: int | None) -> float:
            most = 0.0
            for one, live in stages:
                moving = again.workspace
                # The last stage frees the head first. With vpp the head need not be live when the warm-up ends.
                if cut.vpp == 1 or one.stage < cut.pp - 1:
                    moving += again.restored
                for layers, times in live.items():
                    recomputed = layers if recomputed_layers is None else min(layers, recomputed_layers)
                    moving += times * (recomputed * again.kept + (layers - recomputed) * whole.kept)
                most = max(most, one.states_bytes + moving + reserve_bytes(self.plan, moving))
            return most

        return fullest

    def _live(self, cut: ParallelConfig, training: TrainingConfig) -> list[tuple[StageStates, dict[int, int]]]:
        """Each kind of stage, and live_chunks of it when its warm-up ends."""
        key = (cut.tp, cut.pp, cut.vpp, cut.cp, cut.ep, cut.etp, training.micro_batch_size)
        if key not in self.live:
            dp = self.gpus // (cut.tp * cut.cp * cut.pp)
            micro_batches = training.global_batch_size // (training.micro_batch_size * dp)
            self.live[key] = [
                (one, live_chunks(one.layers, pp=cut.pp, forwards=min(
                    1 + warmup_forwards(one.stage, pp=cut.pp, vpp=cut.vpp, micro_batches=micro_batches),
                    micro_batches * cut.vpp)))
                for one in self._stages(cut)
            ]  # fmt: skip
        return self.live[key]

    def _stages(self, cut: ParallelConfig) -> list[StageStates]:
        key = (cut.tp, cut.pp, cut.vpp, cut.ep, cut.etp)
        if key not in self.stages:
            ranks = self.gpus // cut.pp
            layers, each = stage_sizes(self.plan.model.num_layers, cut), owned_bytes(self.plan)
            weight = 1 if has_one_fp8_weight(self.plan) else VALUE_BYTES[self.plan.precision.dtype]
            on_all = weight + gradient_bytes(self.plan) / gradient_shares(
                self.plan, Layout.from_config(cut, self.gpus)
            )  # fmt: skip
            if freezes(self.plan):  # which weights have gradients and states is not counted here
                on_all, each = weight, 0
            first: dict[tuple[float, float, tuple[int, ...]], StageStates] = {}
            for stage, (dense, expert) in enumerate(self.parameters(cut)):
                owned = each * (dense / (ranks // cut.tp) + expert / (ranks // (cut.ep * cut.etp)))
                own = tuple(layers[stage :: cut.pp])
                states = StageStates(stage, on_all * (dense + expert) + owned, own)
                first.setdefault((dense, expert, own), states)
            self.stages[key] = list(first.values())
        return self.stages[key]

    def _least(self, cut: ParallelConfig, training: TrainingConfig, recompute: Recompute) -> LeastBytes:
        key = (cut.tp, cut.cp, cut.ep, cut.etp, training.micro_batch_size, recompute)
        if key not in self.layers:
            plan = replace(self.plan, training=training, parallel=cut)
            micro = MicroBatch.of(plan, Layout.from_config(cut, self.gpus), plan.imbalance)
            whole = replace(micro, modules=frozenset(), sums={}) if micro.modules else micro
            first = {micro.kind(layer): layer for layer in reversed(range(len(micro.kinds)))}
            kept = {layer: layer_bytes(micro, layer, recompute) for layer in first.values()}
            self.layers[key] = LeastBytes(
                kept=min(kept.values()), restored=min(layer_bytes(whole, layer) - kept[layer] for layer in kept),
                workspace=min(layer_workspace(micro, layer) for layer in kept),
            )  # fmt: skip
        return self.layers[key]


def live_chunks(layers: tuple[int, ...], *, pp: int, forwards: int) -> dict[int, int]:
    """Layers of a virtual stage -> pairs of such a virtual stage and a micro-batch after the first forward passes of a
    rank, which run pp micro-batches through each virtual stage in turn (schedule.virtual_order).

    Args: layers: of each virtual stage of the rank.
    """
    groups, rest = divmod(forwards, pp * len(layers))
    live: dict[int, int] = {}
    for chunk, count in enumerate(layers):
        live[count] = live.get(count, 0) + groups * pp + min(pp, max(0, rest - chunk * pp))
    return live


def most_layers(plan: PlanConfig, cut: ParallelConfig) -> int:
    """Layers of the largest virtual stage."""
    return -(-plan.model.num_layers // (cut.pp * cut.vpp))


def with_recomputed_layers(plan: PlanConfig, cut: ParallelConfig, count: int) -> ParallelConfig:
    """The layout with full recomputation of `count` layers of each virtual stage; of all where it has no more."""
    is_whole = count >= most_layers(plan, cut)
    return replace(cut, recompute=Recompute.full, recompute_layers=None if is_whole else count)
