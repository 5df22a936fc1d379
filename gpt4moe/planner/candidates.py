"""LayoutQueue: layouts that may fit, fastest first. A search takes them one after another.

    degrees x micro-batch --trainer's legality--> memory_lower_bound --> lower bound of the step's time --> queue
    first of the queue --> step_time, back into the queue
                       --> memory in full --fits--> found
                                          --does not--> more recomputation, back into the queue

A layout enters with the least recomputation that may fit. More recomputation is slower, so it is tried only when less
does not fit. Step time and full memory are slow to compute: only layouts that pass the lower bounds get there.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

from gpt4moe.config.beyond import Dispatch
from gpt4moe.config.model import divisors
from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.config.plan import PlanConfig
from gpt4moe.config.training import TrainingConfig
from gpt4moe.errors import ConfigError
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import layout_problems, planned_parts, support_problems
from gpt4moe.planner.estimate import Estimate, estimate, timed_work
from gpt4moe.planner.layer_time import HIDDEN, LAYER_PARTS
from gpt4moe.planner.memory import KnownStates, memory_per_stage
from gpt4moe.planner.memory_lower_bound import MemoryLowerBound, with_recomputed_layers
from gpt4moe.planner.step_time import KnownSeconds, stage_parts, step_time
from gpt4moe.planner.work import Work, busiest_rows

MOST_MISSES = 1000
"""A search stops when the full memory of so many layouts did not fit."""
MOST_ENDLESS = 100
"""It also stops when so many layouts fit whose run would never end, because failures cost too much time."""
EXPERT_CUTS = (2, 4, 8)
"""The values of etp that are tried besides 1."""


@dataclass(frozen=True, order=True, slots=True)
class Candidate:
    """A layout with a micro-batch. Candidates are ordered by seconds, then by number."""

    seconds: float
    """Seconds of a step: a lower bound until is_timed, then exact."""
    number: int
    parallel: ParallelConfig = field(compare=False)
    training: TrainingConfig = field(compare=False)
    is_timed: bool = field(default=False, compare=False)

    @property
    def key(self) -> tuple[int, ...]:
        """Identifies the layout and micro-batch, whatever vpp is and is recomputed: the fastest of those is shown."""
        cut = self.parallel
        return (cut.tp, cut.pp, cut.cp, cut.ep, cut.etp, self.training.micro_batch_size)


@dataclass(kw_only=True, slots=True)
class LayoutQueue:
    """The candidates of one plan on plan.gpus devices, and counts of them."""

    plan: PlanConfig
    bound: MemoryLowerBound
    work: Work
    is_planned: bool = False
    """Whether the model has parts that only the planner knows."""
    trainings: list[TrainingConfig] = field(default_factory=list)
    """The plan's training config, with micro-batches 1, 2, 4 ... up to its batch."""
    legal: int = 0
    """Pairs of a layout and a micro-batch that the trainer would run. The micro-batch doubles until one cannot fit."""
    may_fit: int = 0
    """How many of them may fit with some recomputation, by the lower bound of memory."""
    checked: int = 0
    """How often memory was computed in full. A layout counts once for each kind of recomputation tried."""
    added: int = 0
    """Candidates added to `waiting` so far; it numbers them. Equally fast ones are taken in this order."""
    waiting: list[Candidate] = field(default_factory=list)
    """A heap; the fastest candidate is on top."""
    known: KnownSeconds = field(default_factory=dict)
    legality: dict[tuple[int, ...], bool] = field(default_factory=dict)
    """Cache: degrees with the largest vpp, micro-batch -> whether the trainer would run it."""
    whole: dict[tuple[int, ...], float] = field(default_factory=dict)
    """Cache: (degrees of a stage, micro-batch) -> seconds of one micro-batch through the model, no recomputation."""

    @classmethod
    def of(cls, plan: PlanConfig, gpus: int) -> "LayoutQueue":
        plan = replace(plan, gpus=gpus)
        work = timed_work(plan)
        sizes = [2**power for power in range(plan.training.global_batch_size.bit_length())]
        trainings = [replace(plan.training, micro_batch_size=size) for size in sizes]
        bound, is_planned = MemoryLowerBound(plan, work, gpus), bool(planned_parts(plan.model))
        queue = cls(plan=plan, bound=bound, work=work, trainings=trainings, is_planned=is_planned)
        for parallel in layouts(plan, gpus):
            queue._add_layout(parallel)
        return queue

    def take(self) -> tuple[list[Estimate], ConfigError | None]:
        """The first plan.top layouts that fit, fastest first.

        Also the error of the first layout that fits but whose run would never end, because failures cost too much time.
        """
        states: dict[tuple[int, ...], KnownStates] = {}
        found: dict[tuple[int, ...], Estimate] = {}
        refused, misses, endless = None, 0, 0
        while self.waiting and len(found) < self.plan.top and misses < MOST_MISSES and endless < MOST_ENDLESS:
            candidate = heappop(self.waiting)
            if candidate.key in found:  # already found, with a faster vpp or less recomputation
                continue
            if not candidate.is_timed:
                heappush(self.waiting, self.timed(candidate))
                continue
            self.checked += 1
            if self._fits(candidate, states.setdefault(_degrees(candidate.parallel), {})):
                try:
                    found[candidate.key] = estimate(self._plan_of(candidate))
                except ConfigError as error:
                    refused, endless = refused or error, endless + 1
            else:
                misses += 1
                self._add(self._more_recomputed(candidate), candidate.training)
        return list(found.values()), refused

    @property
    def least_device_seconds(self) -> float:
        """Of one device for one sample, in the layout that takes least, if no device ever waited."""
        return min(seconds * tp * cp / size for (tp, cp, _, _, size), seconds in self.whole.items())

    def _add_layout(self, parallel: ParallelConfig) -> None:
        if self.plan.beyond.overlap_problem(parallel) is not None:
            return
        for training in self._legal_trainings(parallel):
            self.legal += 1
            if not self.bound.states_may_fit(parallel):
                return
            if self.bound.may_fit(parallel, training):
                cuts = [parallel]
            else:
                cuts = self._recomputed(parallel, training)
            if not cuts:
                return  # a larger micro-batch needs more memory
            self.may_fit += 1
            self._add(cuts, training)

    def _legal_trainings(self, parallel: ParallelConfig) -> Iterator[TrainingConfig]:
        """The micro-batches (1, 2, 4 ...) with which the trainer would run the layout: they divide a rank's batch."""
        own = self.plan.training.global_batch_size * parallel.tp * parallel.pp * parallel.cp // self.bound.gpus
        for training in self.trainings:
            # If one micro-batch is illegal, every larger one is.
            if own % training.micro_batch_size or not self._is_legal(parallel, training):
                return
            yield training

    def _is_legal(self, parallel: ParallelConfig, training: TrainingConfig) -> bool:
        """Asks the trainer, of all vpp above 1 once: if the largest is legal, so is each that leaves fewer stages."""
        model, largest = self.plan.model, self.plan.model.num_layers // parallel.pp if parallel.vpp > 1 else 1
        key = (parallel.tp, parallel.pp, largest, parallel.cp, parallel.ep, parallel.etp, training.micro_batch_size)
        if key not in self.legality:
            cut = replace(parallel, vpp=largest)
            # The trainer refuses a model with planned parts; its layouts are planned anyway.
            refused = not self.is_planned and support_problems(model, cut)
            self.legality[key] = not (refused or layout_problems(model, cut, training, self.bound.gpus))
        return self.legality[key]

    def _add(self, cuts: list[ParallelConfig], training: TrainingConfig) -> None:
        for cut in cuts:
            self.added += 1
            heappush(self.waiting, Candidate(self.least_seconds(cut, training), self.added, cut, training))

    def timed(self, candidate: Candidate) -> Candidate:
        cut, training = candidate.parallel, candidate.training
        heaviest = max(self.bound.parameters(cut), key=sum) if self.work.trained is None else None
        step = step_time(
            self._work(cut, training), training, self.bound.gpus, heaviest=heaviest, known=self.known
        )  # fmt: skip
        return replace(candidate, seconds=step.seconds, is_timed=True)

    def least_seconds(self, cut: ParallelConfig, training: TrainingConfig) -> float:
        """A lower bound of step_time: every stage takes the mean time; no recomputation; messages take no time."""
        size = training.micro_batch_size
        key = (cut.tp, cut.cp, cut.ep, cut.etp, size)
        if key not in self.whole:
            alone = ParallelConfig(tp=cut.tp, cp=cut.cp, ep=cut.ep, etp=cut.etp)
            (stage,) = stage_parts(self._work(alone, training), self.known)
            hidden = stage[HIDDEN] if self.work.efficiency.hides_experts else 0.0
            self.whole[key] = sum(stage[part] for part in LAYER_PARTS) - hidden
        micro_batches = training.global_batch_size * cut.tp * cut.cp * cut.pp // (self.bound.gpus * size)
        return self.whole[key] / cut.pp * (micro_batches + (cut.pp - 1) / cut.vpp)

    def _work(self, cut: ParallelConfig, training: TrainingConfig) -> Work:
        imbalance = busiest_rows(self.plan.model, self.plan.imbalance, cut.ep)
        return replace(self.work, parallel=cut, imbalance=imbalance, micro_batch_size=training.micro_batch_size)

    def _more_recomputed(self, candidate: Candidate) -> list[ParallelConfig]:
        cut = candidate.parallel
        if cut.recompute is Recompute.none:
            return self._recomputed(cut, candidate.training)
        if cut.recompute_layers is not None:
            return [with_recomputed_layers(self.plan, cut, cut.recompute_layers + 1)]
        return []

    def _recomputed(self, parallel: ParallelConfig, training: TrainingConfig) -> list[ParallelConfig]:
        """The layout with each kind of recomputation that may make it fit. Full recomputation: of the fewest layers."""
        kinds = [Recompute.selective, *([Recompute.moe] if self.plan.model.moe is not None else [])]
        cuts = [replace(parallel, recompute=kind) for kind in kinds if self.bound.may_fit(parallel, training, kind)]
        if self.plan.beyond.dispatch is Dispatch.overlapped:  # which cannot repeat whole layers
            return cuts
        fewest = self.bound.fewest_recomputed(parallel, training)
        return [*cuts, fewest] if fewest else cuts

    def _fits(self, candidate: Candidate, known: KnownStates) -> bool:
        plan = self._plan_of(candidate)
        layout = Layout.from_config(plan.parallel, self.bound.gpus)
        memory = memory_per_stage(plan, layout, imbalance=plan.imbalance, known=known)
        return max(stage.total_bytes for stage in memory) <= plan.cluster.memory_bytes

    def _plan_of(self, candidate: Candidate) -> PlanConfig:
        return replace(self.plan, parallel=candidate.parallel, training=candidate.training)


def layouts(plan: PlanConfig, gpus: int) -> Iterator[ParallelConfig]:
    """Every layout of the search space (docs/planner.md), legal or not, in a fixed order."""
    model, domain = plan.model, plan.cluster.devices_per_nvlink_domain
    experts = divisors(model.moe.num_experts) if model.moe else [1]
    batch = plan.training.global_batch_size
    for tp in (d for d in divisors(model.num_attention_heads) if d <= domain and gpus % d == 0):
        for pp in (d for d in divisors(gpus // tp) if d <= model.num_layers):
            for cp in (d for d in (1, 2, 4, 8, 16) if gpus % (tp * pp * d) == 0):
                own, left = divmod(batch, gpus // (tp * pp * cp))
                if left or (cp > 1 and model.seq_length // cp < 1024):
                    continue  # dp does not divide the batch, or a rank's part of a sequence is too short
                for vpp in _interleavings(model.num_layers, pp, own):
                    for ep, etp in _expert_cuts(experts, gpus // pp):
                        yield ParallelConfig(tp=tp, pp=pp, cp=cp, vpp=vpp, ep=ep, etp=etp)


def _degrees(cut: ParallelConfig) -> tuple[int, ...]:
    return (cut.tp, cut.pp, cut.vpp, cut.cp, cut.ep, cut.etp)


def _expert_cuts(experts: list[int], ranks: int) -> Iterator[tuple[int, int]]:
    """(ep, etp) over the ranks of a stage.

    etp above 1 is tried only with the largest ep, because ep sends less: a row goes to one rank under ep, but to all
    ranks that share the expert under etp.
    """
    fits = [ep for ep in experts if ranks % ep == 0]
    yield from ((ep, 1) for ep in fits)
    if experts[-1] > 1:
        yield from ((fits[-1], etp) for etp in EXPERT_CUTS if ranks % (fits[-1] * etp) == 0)


def _interleavings(num_layers: int, pp: int, own: int) -> range:
    """Every vpp: as long as each virtual stage has a layer, and micro-batches (of `own` samples of a rank) come in
    groups of pp. Virtual stages may be uneven."""
    return range(1, num_layers // pp + 1) if pp > 1 and own % pp == 0 else range(1, 2)
