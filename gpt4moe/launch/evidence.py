"""What the checks judge by, and what a check says. No torch."""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from gpt4moe.config.run import RunConfig
from gpt4moe.launch.data_facts import DataFacts
from gpt4moe.launch.disk import DiskFacts
from gpt4moe.launch.facts import RankFacts
from gpt4moe.launch.needs import Needs
from gpt4moe.parallel.layout import Layout

KINDS = ("tp", "cp", "ep", "etp", "dp_cp", "expert_dp", "pp")
"""Groups that training sends over, as ProcessGroups names them."""
WARNING_SECONDS = 120.0
"""Between Slurm's signal and the time limit, by the header of slurm/train.sh; sbatch --signal sets another."""


class Status(str, Enum):
    """not_checked is no good news: the reason stands where the measured value would."""

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
    """With the ranks or nodes concerned; why not, of a check that was not made."""
    expected: str = ""
    cure: str = ""
    """What to do; of warned and failed ones."""


def not_checked(name: str, why: str, expected: str = "") -> CheckResult:
    return CheckResult(name=name, status=Status.not_checked, measured=why, expected=expected)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """One kind of message of one rank."""

    group: str
    operation: str
    size_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Speeds:
    """What one rank measured while all others measured too."""

    device: str
    """cuda or cpu."""
    matrix_flops: float
    """FLOP/s of a large product in the run's precision."""
    messages: list[Timed]
    pairs: dict[str, float]
    """Other node -> bytes per second out of this rank, while all ranks of both nodes exchange."""


@dataclass(kw_only=True, slots=True)
class Evidence:
    """Notes of all ranks that came, by rank."""

    run: RunConfig
    world_size: int
    """Ranks that the run is judged for."""
    started: int
    """Ranks of this preflight; another number than world_size only for a single process (ranks=N)."""
    facts: dict[int, RankFacts]
    data: dict[int, DataFacts]
    problems: list[tuple[str, str]]
    """Cause and cure of why the layout is not legal."""
    needs: Needs | None = None
    """None for an illegal layout."""
    layout: Layout | None = None
    disk: dict[int, DiskFacts] = field(default_factory=dict)
    speeds: dict[int, Speeds] = field(default_factory=dict)
    unmeasured: str = ""
    """Why groups were not made, so that no speeds are here."""
    broken: str = ""
    """What went wrong when they were made and measured."""
    time_limit_seconds: float | None = None
    """Of the training job."""
    warning_seconds: float = WARNING_SECONDS
    """Between Slurm's signal to the training job and its time limit."""

    @property
    def is_whole(self) -> bool:
        """Whether the ranks here are those of the run."""
        return self.started == self.world_size

    @property
    def missing(self) -> list[int]:
        return [rank for rank in range(self.started) if rank not in self.facts]

    @property
    def hosts(self) -> list[str]:
        """The node of each of the run's ranks; for ranks that are not here, as devices_per_node would place them."""
        if self.is_whole and not self.missing:
            return [self.facts[rank].host for rank in range(self.started)]
        return [f"node {rank // self.run.cluster.devices_per_node}" for rank in range(self.world_size)]

    @property
    def ranks_on_node(self) -> int:
        """The most on any node."""
        return max(Counter(self.hosts).values())

    @property
    def is_nominal(self) -> bool:
        """Whether the cluster's figures are no promise of a data sheet."""
        return self.run.cluster.generation.value == "cpu"

    def named(self, ranks: list[int], most: int = 4) -> str:
        """ranks 3, 5 (node2): for a person who must find the machine."""
        shown = ", ".join(map(str, ranks[:most])) + (f" and {len(ranks) - most} more" if len(ranks) > most else "")
        hosts = sorted({self.facts[rank].host for rank in ranks if rank in self.facts})
        where = f" ({', '.join(hosts[:most])}{' and more' if len(hosts) > most else ''})" if hosts else ""
        return f"rank{'s' * (len(ranks) > 1)} {shown}{where}"
