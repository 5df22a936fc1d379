"""The input of the checks: facts of all ranks, and the run's needs by the planner. And a check's result. No torch."""

from collections import Counter
from dataclasses import dataclass, field, fields
from enum import Enum

from gpt4moe.config.plan import PlanConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.launch.facts import RankFacts
from gpt4moe.launch.rank_files import DataFacts, DiskFacts
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.checkpoint_size import checkpoint_bytes, saved_bytes, state_bytes
from gpt4moe.planner.estimate import timed_work
from gpt4moe.planner.memory import StageMemory, memory_per_stage
from gpt4moe.planner.step_time import step_time

GROUP_KINDS = ("tp", "cp", "ep", "etp", "dp_cp", "expert_dp", "pp")
"""The kinds of groups that training communicates in, by their names in ProcessGroups."""
WARNING_SECONDS = 120.0
"""Seconds between Slurm's signal and the time limit in the header of slurm/train.sh; sbatch --signal changes it."""


class Status(str, Enum):
    """Status of a check. not_checked: CheckResult.measured holds the reason instead of a value."""

    passed = "passed"
    warned = "warned"
    failed = "failed"
    not_checked = "not checked"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    """One row of the answer."""

    name: str
    status: Status
    measured: str
    """The measured value, with the ranks or nodes that it is about. For not_checked: the reason."""
    expected: str = ""
    cure: str = ""
    """What to do; empty unless the check warned or failed."""


def not_checked(name: str, why: str, expected: str = "") -> CheckResult:
    return CheckResult(name=name, status=Status.not_checked, measured=why, expected=expected)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """The time of one kind of message on one rank."""

    group: str
    operation: str
    size_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Speeds:
    """Speeds that one rank measured while all other ranks measured too."""

    device: str
    """cuda or cpu."""
    matrix_flops: float
    """FLOP/s of a large matrix product in the run's precision."""
    messages: list[Timed]
    pairs: dict[str, float]
    """Partner node -> bytes per second that this rank sent, while all ranks of both nodes exchanged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a run with a legal layout needs of its cluster, as the planner computes it."""

    fullest: StageMemory
    step_seconds: float
    rank_state_bytes: float
    """Bytes that a rank of the largest stage copies to host memory and writes into a checkpoint."""
    offloaded_bytes: float
    """Bytes of a rank's optimizer in host memory; 0 if it is on the device."""
    checkpoint_bytes: float
    """Bytes of one checkpoint of all ranks."""
    num_checkpoints: int
    """The largest number of checkpoints in the run folder at once."""


@dataclass(kw_only=True, slots=True)
class PreflightEvidence:
    """The facts about the run and about all ranks that are present. Dictionaries have the rank as key."""

    run: RunConfig
    world_size: int
    """Ranks of the run."""
    started: int
    """Ranks of this preflight: world_size, or 1 with ranks=N."""
    facts: dict[int, RankFacts]
    data: dict[int, DataFacts]
    problems: list[tuple[str, str]]
    """Cause and cure if the layout is not legal."""
    needs: Needs | None = None
    """None for an illegal layout."""
    layout: Layout | None = None
    disk: dict[int, DiskFacts] = field(default_factory=dict)
    speeds: dict[int, Speeds] = field(default_factory=dict)
    unmeasured: str = ""
    """Why groups were not made (there are no speeds then); empty if they were."""
    broken: str = ""
    """The problem that making or measuring the groups had; empty if none."""
    time_limit_seconds: float | None = None
    """Time limit of the training job."""
    warning_seconds: float = WARNING_SECONDS
    """Between Slurm's signal to the training job and its time limit."""

    @property
    def is_whole(self) -> bool:
        """Whether all ranks of the run were started."""
        return self.started == self.world_size

    @property
    def missing(self) -> list[int]:
        return [rank for rank in range(self.started) if rank not in self.facts]

    @property
    def hosts(self) -> list[str]:
        """The node of each rank of the run. With ranks=N: names made from devices_per_node."""
        if self.is_whole and not self.missing:
            return [self.facts[rank].host for rank in range(self.started)]
        return [f"node {rank // self.run.cluster.devices_per_node}" for rank in range(self.world_size)]

    @property
    def ranks_on_node(self) -> int:
        """The most ranks on any node."""
        return max(Counter(self.hosts).values())

    @property
    def is_nominal(self) -> bool:
        """Whether the cluster's figures are nominal. Then no measurement is judged by them."""
        return self.run.cluster.generation.value == "cpu"

    def named(self, ranks: list[int], most: int = 4) -> str:
        """Names ranks and their nodes, so that a person can find the machine: `ranks 3, 5 (node2)`."""
        shown = ", ".join(map(str, ranks[:most])) + (f" and {len(ranks) - most} more" if len(ranks) > most else "")
        hosts = sorted({self.facts[rank].host for rank in ranks if rank in self.facts})
        where = f" ({', '.join(hosts[:most])}{' and more' if len(hosts) > most else ''})" if hosts else ""
        return f"rank{'s' * (len(ranks) > 1)} {shown}{where}"


def needs(run: RunConfig, layout: Layout) -> Needs:
    """The layout must be legal (legality.layout_problems). On cluster=cpu the step time is only rough."""
    plan = PlanConfig(**{field.name: getattr(run, field.name) for field in fields(RunConfig)})
    work = timed_work(plan)
    return Needs(
        fullest=max(memory_per_stage(run, layout), key=lambda stage: stage.total_bytes),
        step_seconds=step_time(work, run.training, layout.world_size).seconds,
        rank_state_bytes=saved_bytes(work, layout.world_size),
        offloaded_bytes=state_bytes(work, layout.world_size) if run.engine.offload_optimizer else 0.0,
        checkpoint_bytes=checkpoint_bytes(run.model, work.trained),
        num_checkpoints=checkpoints_at_once(run),
    )


def checkpoints_at_once(run: RunConfig) -> int:
    """Number of checkpoints: the newest checkpoint.keep, those kept forever, and the one being written."""
    steps, kept = run.training.steps, run.checkpoint
    written = -(-steps // kept.every) if kept.every else 1
    if not kept.keep:
        return written
    for_good = steps // kept.keep_every if kept.keep_every else 0
    return min(written, kept.keep + 1 + for_good)
