"""A quick look at whether a layout can fit: less than its memory for certain, so it refuses nothing that would fit.

states without padding + live activations of the first stage -> a lower bound -> the fewest layers to recompute
"""

from dataclasses import dataclass, field, replace
from math import ceil

from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.config.plan import PlanConfig
from gpt4moe.config.training import TrainingConfig
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.schedule import warmup_forwards
from gpt4moe.planner.activations import MicroBatch, layer_bytes
from gpt4moe.planner.estimate import STATE_BYTES
from gpt4moe.planner.layer_time import Work
from gpt4moe.planner.memory import FRAGMENTATION, reserved_bytes
from gpt4moe.planner.step_time import heaviest_stage


@dataclass(frozen=True, slots=True)
class Glance:
    """What many layouts of one plan share is worked out once."""

    plan: PlanConfig
    gpus: int
    sizes: dict[tuple[int, ...], tuple[float, float]] = field(default_factory=dict)
    micro: dict[tuple[int, ...], MicroBatch] = field(default_factory=dict)
    least: dict[tuple[tuple[int, ...], Recompute], int] = field(default_factory=dict)

    def parameters(self, work: Work) -> tuple[float, float]:
        """Dense and expert ones of a rank of the heaviest stage."""
        cut = work.parallel
        key = (cut.tp, cut.pp, cut.vpp, cut.ep, cut.etp)
        if key not in self.sizes:
            self.sizes[key] = heaviest_stage(work)
        return self.sizes[key]

    def left(self, work: Work) -> float:
        """Bytes that the states leave to activations; at most 0: they do not fit."""
        dense, expert = self.parameters(work)
        cut = work.parallel
        stage = self.gpus // cut.pp
        owned_bytes = 0 if self.plan.engine.offload_optimizer else STATE_BYTES
        owned = owned_bytes * (dense / (stage // cut.tp) + expert / (stage // (cut.ep * cut.etp)))
        states = (work.value_bytes + 4) * (dense + expert) + owned
        return self.plan.cluster.memory_bytes - reserved_bytes(self.plan) - states

    def recomputed(
        self, parallel: ParallelConfig, training: TrainingConfig, recompute: Recompute, left: float
    ) -> ParallelConfig | None:
        """The layout with this recomputation, of whole layers in as few as may do; None: it cannot fit."""
        full = recompute is Recompute.full
        layers = self.plan.model.num_layers // (parallel.pp * parallel.vpp)
        each = left / ((1 + FRAGMENTATION) * self._live(parallel, training))  # bytes of a chunk and micro-batch
        kept = self._least(parallel, training, Recompute.none if full else recompute)
        if not full:
            return replace(parallel, recompute=recompute) if kept * layers < each else None
        again = self._least(parallel, training, recompute)
        if again * layers >= each:
            return None
        count = max(1, ceil((layers * kept - each) / (kept - again)))
        return with_recomputed_layers(self.plan, replace(parallel, recompute=recompute), count)

    def _live(self, parallel: ParallelConfig, training: TrainingConfig) -> int:
        """Chunks and micro-batches whose activations the first stage holds at once."""
        dp = self.gpus // (parallel.tp * parallel.cp * parallel.pp)
        micro_batches = training.global_batch_size // (training.micro_batch_size * dp)
        warmup = warmup_forwards(0, pp=parallel.pp, vpp=parallel.vpp, micro_batches=micro_batches)
        return min(1 + warmup, micro_batches * parallel.vpp)

    def _least(self, parallel: ParallelConfig, training: TrainingConfig, recompute: Recompute) -> int:
        """Bytes that the kind of layer that keeps least keeps."""
        key = (parallel.tp, parallel.cp, parallel.ep, parallel.etp, training.micro_batch_size)
        if (key, recompute) not in self.least:
            if key not in self.micro:
                plan = replace(self.plan, training=training, parallel=parallel)
                self.micro[key] = MicroBatch.of(plan, Layout.from_config(parallel, self.gpus), plan.imbalance)
            micro = self.micro[key]
            kinds = {is_moe: layer for layer, is_moe in enumerate(micro.moe_layers)}
            self.least[key, recompute] = min(layer_bytes(micro, layer, recompute) for layer in kinds.values())
        return self.least[key, recompute]


def with_recomputed_layers(plan: PlanConfig, parallel: ParallelConfig, count: int) -> ParallelConfig:
    """Full recompute of `count` layers of each virtual stage, or of all where they are no more, or where the trainer
    wants all (a router with noise)."""
    most = -(-plan.model.num_layers // (parallel.pp * parallel.vpp))
    is_noisy = plan.model.moe is not None and plan.model.moe.router.input_jitter > 0
    return replace(parallel, recompute_layers=None if count >= most or is_noisy else count)
