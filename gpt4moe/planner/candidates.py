"""Layouts that may fit, fastest first: what a search takes from, one after another.

    degrees x micro-batch --legality (the trainer's)--> may it fit (glance) --> lower bound of its step --> Pool
    --fastest first--> step_time, back into the pool
    --fastest first--> memory in full --fits--> found
                                      --does not--> recomputed more, back into the pool

A layout comes with as little recomputation as may do: more of it is slower, so it is looked at only when less does not
fit. A step's time and memory in full are slow, so they are asked best first, and only of what lower bounds let through.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

from gpt4moe.config.model import divisors
from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.config.plan import PlanConfig
from gpt4moe.config.training import TrainingConfig
from gpt4moe.errors import ConfigError
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import layout_problems, planned_parts, support_problems
from gpt4moe.planner.estimate import Estimate, estimate, timed_work
from gpt4moe.planner.glance import Glance, with_recomputed_layers
from gpt4moe.planner.layer_time import Work
from gpt4moe.planner.memory import KnownStates, memory_per_stage
from gpt4moe.planner.step_time import KnownSeconds, stage_parts, step_time

MOST_MISSES = 300
"""Memories worked out in full of what then does not fit, before a search stops: a second of work."""
EXPERT_CUTS = (2, 4, 8)
"""Of etp, above 1."""


@dataclass(frozen=True, order=True, slots=True)
class Candidate:
    seconds: float
    """Of a step; at least these, until it is timed."""
    number: int
    parallel: ParallelConfig = field(compare=False)
    training: TrainingConfig = field(compare=False)
    is_timed: bool = field(default=False, compare=False)

    @property
    def key(self) -> tuple[int, ...]:
        """What stays when more is recomputed."""
        return (*_degrees(self.parallel), self.training.micro_batch_size)


@dataclass(kw_only=True, slots=True)
class Pool:
    """The candidates of one plan on plan.gpus devices."""

    plan: PlanConfig
    look: Glance
    work: Work
    trainings: list[TrainingConfig] = field(default_factory=list)
    """The plan's with micro-batches 1, 2, 4 ... of its batch."""
    legal: int = 0
    """Layouts with a micro-batch that the trainer would run: micro-batches are doubled until one cannot fit."""
    may_fit: int = 0
    """Of those, how many a lower bound of their memory let through, with some recomputation."""
    checked: int = 0
    """Memories worked out in full, each recomputation of a layout counted."""
    added: int = 0
    """To `waiting`, so far: of equally fast ones the first comes first."""
    waiting: list[Candidate] = field(default_factory=list)
    """A heap, fastest first."""
    known: KnownSeconds = field(default_factory=dict)
    whole: dict[tuple[int, ...], float] = field(default_factory=dict)
    """Degrees within a stage, micro-batch -> seconds of a micro-batch through the whole model, nothing recomputed."""

    @classmethod
    def of(cls, plan: PlanConfig, gpus: int) -> "Pool":
        plan = replace(plan, gpus=gpus)
        work = timed_work(plan)
        sizes = [2**power for power in range(plan.training.global_batch_size.bit_length())]
        trainings = [replace(plan.training, micro_batch_size=size) for size in sizes]
        pool = cls(plan=plan, look=Glance(plan, work, gpus), work=work, trainings=trainings)
        for parallel in layouts(plan, gpus):
            pool._add_layout(parallel)
        return pool

    def take(self) -> tuple[list[Estimate], ConfigError | None]:
        """The first plan.top that fit, fastest first; and why one that fits was left out, where failures eat up what
        it runs."""
        states: dict[tuple[int, ...], KnownStates] = {}
        found: dict[tuple[int, ...], Estimate] = {}
        refused = None
        while self.waiting and len(found) < self.plan.top and self.checked - len(found) < MOST_MISSES:
            candidate = heappop(self.waiting)
            if candidate.key in found:  # with less recomputed
                continue
            if not candidate.is_timed:
                heappush(self.waiting, self.timed(candidate))
                continue
            self.checked += 1
            if self._fits(candidate, states.setdefault(_degrees(candidate.parallel), {})):
                try:
                    found[candidate.key] = estimate(self._plan_of(candidate))
                except ConfigError as error:
                    refused = refused or error
            else:
                self._add(self._more_recomputed(candidate), candidate.training)
        return list(found.values()), refused

    def fastest(self) -> float:
        """Seconds of a step of the fastest layout that may fit; there must be one."""
        while not self.waiting[0].is_timed:
            heappush(self.waiting, self.timed(heappop(self.waiting)))
        return self.waiting[0].seconds

    def _add_layout(self, parallel: ParallelConfig) -> None:
        plan, gpus = self.plan, self.look.gpus
        for training in _legal_trainings(plan, parallel, gpus, self.trainings):
            self.legal += 1
            if not self.look.states_may_fit(parallel):
                return
            if self.look.may_fit(parallel, training):
                cuts = [parallel]
            else:
                cuts = self._recomputed(parallel, training)
            if not cuts:
                return  # a larger micro-batch keeps more
            self.may_fit += 1
            self._add(cuts, training)

    def _add(self, cuts: list[ParallelConfig], training: TrainingConfig) -> None:
        for cut in cuts:
            self.added += 1
            heappush(self.waiting, Candidate(self.least_seconds(cut, training), self.added, cut, training))

    def timed(self, candidate: Candidate) -> Candidate:
        cut, training = candidate.parallel, candidate.training
        heaviest = max(self.look.parameters(cut), key=sum)
        step = step_time(
            self._work(cut, training), training, self.look.gpus, heaviest=heaviest, known=self.known
        )  # fmt: skip
        return replace(candidate, seconds=step.seconds, is_timed=True)

    def least_seconds(self, cut: ParallelConfig, training: TrainingConfig) -> float:
        """At most step_time: as if all stages took the mean, nothing were recomputed, and no messages took time."""
        size = training.micro_batch_size
        key = (cut.tp, cut.cp, cut.ep, cut.etp, size)
        if key not in self.whole:
            alone = ParallelConfig(tp=cut.tp, cp=cut.cp, ep=cut.ep, etp=cut.etp)
            (stage,) = stage_parts(self._work(alone, training), self.known)
            self.whole[key] = sum(stage.values())
        micro_batches = training.global_batch_size * cut.tp * cut.cp * cut.pp // (self.look.gpus * size)
        return self.whole[key] / cut.pp * (micro_batches + (cut.pp - 1) / cut.vpp)

    def _work(self, cut: ParallelConfig, training: TrainingConfig) -> Work:
        imbalance = self.plan.imbalance if cut.ep > 1 else 1.0
        return replace(self.work, parallel=cut, imbalance=imbalance, micro_batch_size=training.micro_batch_size)

    def _more_recomputed(self, candidate: Candidate) -> list[ParallelConfig]:
        cut = candidate.parallel
        if cut.recompute is Recompute.none:
            return self._recomputed(cut, candidate.training)
        if cut.recompute_layers is not None:
            return [with_recomputed_layers(self.plan, cut, cut.recompute_layers + 1)]
        return []

    def _recomputed(self, parallel: ParallelConfig, training: TrainingConfig) -> list[ParallelConfig]:
        """Each kind of recomputation with which the layout may fit, full with the fewest layers."""
        kinds = [Recompute.selective, *([Recompute.moe] if self.plan.model.moe is not None else [])]
        cuts = [replace(parallel, recompute=kind) for kind in kinds if self.look.may_fit(parallel, training, kind)]
        fewest = self.look.fewest_recomputed(parallel, training)
        return [*cuts, fewest] if fewest else cuts

    def _fits(self, candidate: Candidate, known: KnownStates) -> bool:
        plan = self._plan_of(candidate)
        layout = Layout.from_config(plan.parallel, self.look.gpus)
        memory = memory_per_stage(plan, layout, imbalance=plan.imbalance, known=known)
        return max(stage.total_bytes for stage in memory) <= plan.cluster.memory_bytes

    def _plan_of(self, candidate: Candidate) -> PlanConfig:
        return replace(self.plan, parallel=candidate.parallel, training=candidate.training)


def layouts(plan: PlanConfig, gpus: int) -> Iterator[ParallelConfig]:
    """Every layout worth asking the trainer about, in a fixed order."""
    model, domain = plan.model, plan.cluster.devices_per_nvlink_domain
    experts = divisors(model.moe.num_experts) if model.moe else [1]
    batch = plan.training.global_batch_size
    for tp in (d for d in divisors(model.num_attention_heads) if d <= domain and gpus % d == 0):
        for pp in (d for d in divisors(gpus // tp) if d <= model.num_layers):
            for cp in (d for d in (1, 2, 4, 8, 16) if gpus % (tp * pp * d) == 0):
                if batch % (gpus // (tp * pp * cp)) or (cp > 1 and model.seq_length // cp < 1024):
                    continue  # the batch does not divide; or a rank's part of a sequence would be tiny
                for vpp in _interleavings(model.num_layers, pp):
                    for ep, etp in _expert_cuts(experts, gpus // pp):
                        yield ParallelConfig(tp=tp, pp=pp, cp=cp, vpp=vpp, ep=ep, etp=etp)


def _degrees(cut: ParallelConfig) -> tuple[int, ...]:
    return (cut.tp, cut.pp, cut.vpp, cut.cp, cut.ep, cut.etp)


def _expert_cuts(experts: list[int], ranks: int) -> Iterator[tuple[int, int]]:
    """ep and etp over the ranks of a stage. Experts themselves are cut (etp 2 to 8) only where ep is as large as it
    goes: on the same ranks, more ep sends each row once, more etp to all that share an expert."""
    fits = [ep for ep in experts if ranks % ep == 0]
    yield from ((ep, 1) for ep in fits)
    if experts[-1] > 1:
        yield from ((fits[-1], etp) for etp in EXPERT_CUTS if ranks % (fits[-1] * etp) == 0)


def _legal_trainings(
    plan: PlanConfig, parallel: ParallelConfig, gpus: int, trainings: list[TrainingConfig]
) -> Iterator[TrainingConfig]:
    """Those of micro-batches 1, 2, 4 ... that the trainer would run the layout with: they divide a rank's batch."""
    own = plan.training.global_batch_size // (gpus // (parallel.tp * parallel.pp * parallel.cp))
    is_planned = bool(planned_parts(plan.model))  # the trainer refuses the model itself: weigh its layouts all the same
    if not is_planned and support_problems(plan.model, parallel):
        return
    for training in trainings:
        # What one micro-batch refuses, a larger one does too.
        if own % training.micro_batch_size or layout_problems(plan.model, parallel, training, gpus):
            return
        yield training


def _interleavings(num_layers: int, pp: int) -> list[int]:
    """1, and virtual stages that all get as many layers; at most four of them: more are seldom apart."""
    even = [vpp for vpp in divisors(num_layers // pp) if vpp > 1] if pp > 1 and num_layers % pp == 0 else []
    return [1, *even[:3]]
