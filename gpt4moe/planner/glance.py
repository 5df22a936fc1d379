"""A quick look at whether a layout can fit: never more than its memory, so it refuses nothing that would fit.

each stage: states without padding + live activations of its smallest chunk, by the layer that keeps least
-> the fullest stage -> a lower bound -> may it fit, and with how few layers recomputed
"""

from bisect import bisect_left
from dataclasses import dataclass, field, replace

from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.config.plan import PlanConfig
from gpt4moe.config.training import TrainingConfig
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.placement import stage_sizes
from gpt4moe.parallel.schedule import warmup_forwards
from gpt4moe.planner.activations import MicroBatch, layer_bytes
from gpt4moe.planner.layer_time import Work
from gpt4moe.planner.memory import reserve_bytes
from gpt4moe.planner.state_bytes import GRADIENT_BYTES, VALUE_BYTES, owned_bytes
from gpt4moe.planner.step_time import stage_parameters


@dataclass(frozen=True, slots=True)
class StageStates:
    """Pipeline stages that are alike; of those the first, whose activations are most."""

    stage: int
    states_bytes: float
    layers: int
    """Of its smallest virtual stage."""


@dataclass(frozen=True, slots=True)
class Glance:
    """What many layouts of one plan share is worked out once. Of a layout its degrees and recomputation count: layers
    lie as evenly on stages as they go."""

    plan: PlanConfig
    work: Work
    gpus: int
    sizes: dict[tuple[int, ...], list[tuple[float, float]]] = field(default_factory=dict)
    stages: dict[tuple[int, ...], list[StageStates]] = field(default_factory=dict)
    micro: dict[tuple[int, ...], MicroBatch] = field(default_factory=dict)

    def parameters(self, cut: ParallelConfig) -> list[tuple[float, float]]:
        """Dense and expert ones of a rank of each stage."""
        key = (cut.tp, cut.pp, cut.vpp, cut.ep, cut.etp)
        if key not in self.sizes:
            self.sizes[key] = stage_parameters(replace(self.work, parallel=cut))
        return self.sizes[key]

    def may_fit(self, cut: ParallelConfig, training: TrainingConfig) -> bool:
        """False: it does not."""
        return self.least_bytes(cut, training) <= self.plan.cluster.memory_bytes

    def states_may_fit(self, cut: ParallelConfig) -> bool:
        """False: it does not, whatever the micro-batch and recomputation."""
        most = max(stage.states_bytes for stage in self._stages(cut))
        return most + reserve_bytes(self.plan, 0) <= self.plan.cluster.memory_bytes

    def least_bytes(self, cut: ParallelConfig, training: TrainingConfig) -> float:
        """At most what the fullest rank needs (memory.memory_per_stage)."""
        kept, again = self._least(cut, training, Recompute.none), self._least(cut, training, cut.recompute)
        dp = self.gpus // (cut.tp * cut.cp * cut.pp)
        micro_batches = training.global_batch_size // (training.micro_batch_size * dp)
        most = 0.0
        for one in self._stages(cut):
            warmup = warmup_forwards(one.stage, pp=cut.pp, vpp=cut.vpp, micro_batches=micro_batches)
            live = min(1 + warmup, micro_batches * cut.vpp)  # chunks and micro-batches at once
            recomputed = one.layers if cut.recompute_layers is None else min(one.layers, cut.recompute_layers)
            activations = live * (recomputed * again + (one.layers - recomputed) * kept)
            most = max(most, one.states_bytes + activations + reserve_bytes(self.plan, activations))
        return most

    def fewest_recomputed(self, cut: ParallelConfig, training: TrainingConfig) -> ParallelConfig | None:
        """The layout with full recompute of as few layers as may do; None: not even all may."""
        counts = range(1, most_layers(self.plan, cut) + 1)
        cuts = [with_recomputed_layers(self.plan, cut, count) for count in counts]
        first = bisect_left(cuts, True, key=lambda more: self.may_fit(more, training))
        return cuts[first] if first < len(cuts) else None

    def _stages(self, cut: ParallelConfig) -> list[StageStates]:
        key = (cut.tp, cut.pp, cut.vpp, cut.cp, cut.ep, cut.etp)
        if key not in self.stages:
            ranks = self.gpus // cut.pp
            layers, each = stage_sizes(self.plan.model.num_layers, cut), owned_bytes(self.plan)
            on_all = VALUE_BYTES[self.plan.precision.dtype] + GRADIENT_BYTES
            first: dict[tuple[float, ...], StageStates] = {}
            for stage, (dense, expert) in enumerate(self.parameters(cut)):
                owned = each * (dense / (ranks // cut.tp) + expert / (ranks // (cut.ep * cut.etp)))
                fewest = min(layers[stage :: cut.pp])
                states = StageStates(stage, on_all * (dense + expert) + owned, fewest)
                first.setdefault((dense, expert, fewest), states)
            self.stages[key] = list(first.values())
        return self.stages[key]

    def _least(self, cut: ParallelConfig, training: TrainingConfig, recompute: Recompute) -> int:
        """Bytes that the kind of layer that keeps least keeps."""
        key = (cut.tp, cut.cp, cut.ep, cut.etp, training.micro_batch_size)
        if key not in self.micro:
            plan = replace(self.plan, training=training, parallel=cut)
            self.micro[key] = MicroBatch.of(plan, Layout.from_config(cut, self.gpus), plan.imbalance)
        micro = self.micro[key]
        return min(layer_bytes(micro, micro.moe_layers.index(kind), recompute) for kind in set(micro.moe_layers))


def most_layers(plan: PlanConfig, cut: ParallelConfig) -> int:
    """Of a virtual stage."""
    return -(-plan.model.num_layers // (cut.pp * cut.vpp))


def with_recomputed_layers(plan: PlanConfig, cut: ParallelConfig, count: int) -> ParallelConfig:
    """Full recompute of `count` layers of each virtual stage, or of all where they are no more, or where the trainer
    wants all (a router with noise)."""
    is_noisy = plan.model.moe is not None and plan.model.moe.router.input_jitter > 0
    is_whole = count >= most_layers(plan, cut) or is_noisy
    return replace(cut, recompute=Recompute.full, recompute_layers=None if is_whole else count)
