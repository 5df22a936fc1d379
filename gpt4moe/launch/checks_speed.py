"""Checks of speeds: matrix products of each rank, messages of each group, links of each node.

Each speed is compared with two others: what the planner assumes from the cluster's figures (configs/cluster), and the
median of its kind. The second finds a bad card, cable or fan. It needs no figures, so it is done on CPUs too.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from statistics import median

from gpt4moe.config.cluster import ClusterConfig
from gpt4moe.launch.evidence import GROUP_KINDS, CheckResult, PreflightEvidence, Status, Timed, not_checked
from gpt4moe.planner.efficiency import ALL_TO_ALL_SHARE, RING_SHARE, planning_profile


@dataclass(frozen=True, slots=True)
class Floor:
    """Shares of the expected speed below which a check warns and fails."""

    warned: float
    failed: float

    def status(self, share: float) -> Status:
        if share < self.failed:
            return Status.failed
        return Status.warned if share < self.warned else Status.passed


FIGURES = Floor(0.9, 0.6)
LIKES = {"cuda": Floor(0.93, 0.85), "cpu": Floor(0.5, 0.2)}
"""Floors against the median of its kind. They are lower on CPUs, whose cores other processes share."""
LIKE_LINKS = {"cuda": Floor(0.9, 0.7), "cpu": Floor(0.5, 0.2)}
SLOW_LINK = (
    "Look at NCCL_DEBUG=INFO: it says whether NVLink and the fabric are used; NCCL_SOCKET_IFNAME and NCCL_IB_HCA in "
    "slurm/cluster.env choose it."
)
UNFINISHED = "the measurement broke off: see groups"
NOMINAL = "alike (cluster=cpu has no figures to judge by)"


def matrix_speed(evidence: PreflightEvidence) -> CheckResult:
    """Finds slow ranks, and a cluster=... that does not match these GPUs."""
    name, cluster = "matrix products", evidence.run.cluster
    rates = {rank: speeds.matrix_flops for rank, speeds in evidence.speeds.items()}
    if not rates:
        return not_checked(name, evidence.unmeasured or UNFINISHED)
    usual = median(rates.values())
    slowest = min(rates, key=rates.__getitem__)
    floor = LIKES[evidence.speeds[slowest].device]
    slow = sorted(rank for rank, rate in rates.items() if floor.status(rate / usual) is not Status.passed)
    measured = f"median {usual / 1e12:.3g} TFLOP/s, slowest {evidence.named([slowest])} {rates[slowest] / 1e12:.3g}"
    if slow:
        return CheckResult(
            name=name, status=floor.status(rates[slowest] / usual),
            measured=f"{measured}; slow: {evidence.named(slow)}", expected=_alike(floor),
            cure="Look for heat, power caps or another process there; leave the node out: sbatch --exclude=NODE.",
        )  # fmt: skip
    if evidence.is_nominal:
        return CheckResult(name=name, status=Status.passed, measured=measured, expected=NOMINAL)
    planned = cluster.peak_flops(evidence.run.precision.dtype) * planning_profile(cluster.generation).matrix
    status = FIGURES.status(usual / planned)
    return CheckResult(
        name=name, status=status, measured=measured, expected=f"{planned / 1e12:.3g} as planned for {cluster.name}",
        cure="" if status is Status.passed else "Choose the cluster=... that these GPUs are, or look for power caps.",
    )  # fmt: skip


def group_speeds(evidence: PreflightEvidence) -> list[CheckResult]:
    """A result for each kind of group and operation, and one for all kinds whose groups have one rank."""
    layout = evidence.layout
    if evidence.broken:
        return [
            CheckResult(
                name="groups", status=Status.failed, measured=evidence.broken, expected="every rank reaches the others",
                cure="Choose the network that all nodes share: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME in "
                "slurm/cluster.env; NCCL_DEBUG=INFO says what it tries.",
            )
        ]  # fmt: skip
    if not evidence.speeds or layout is None:
        return [not_checked("groups", evidence.unmeasured)]
    rows: dict[tuple[str, str], dict[int, Timed]] = defaultdict(dict)
    for rank, speeds in evidence.speeds.items():
        for timed in speeds.messages:
            rows[timed.group, timed.operation][rank] = timed
    alone = [name for name in GROUP_KINDS if len(layout.members(name, 0)) == 1]
    results = [_group_speed(evidence, *key, ranks) for key, ranks in rows.items()]
    return results + ([not_checked(", ".join(alone), "groups of one rank")] if alone else [])


def _group_speed(evidence: PreflightEvidence, kind: str, operation: str, timed: dict[int, Timed]) -> CheckResult:
    layout, hosts = evidence.layout, evidence.hosts
    assert layout is not None
    name = f"{kind} {operation.replace('_', '-')}"
    shares, rates = {}, {}
    for rank in timed:
        members = tuple(layout.members(kind, rank))
        if members in rates or members[0] != rank:
            continue
        seconds = max(timed[member].seconds for member in members)
        rates[members] = bus_bytes(operation, timed[rank].size_bytes, len(members)) / seconds
        shares[members] = rates[members] / promised_rate(evidence.run.cluster, operation, [hosts[m] for m in members])
    usual, slowest = median(rates.values()), min(rates, key=rates.__getitem__)
    floor = LIKE_LINKS[evidence.speeds[slowest[0]].device]
    slow = [members for members, rate in rates.items() if floor.status(rate / usual) is not Status.passed]
    measured = f"{rates[slowest] / 1e9:.3g} GB/s in the slowest of {len(rates)}, median {usual / 1e9:.3g}"
    if slow:
        return CheckResult(
            name=name, status=floor.status(rates[slowest] / usual), expected=_alike(floor),
            measured=f"{measured}; slow: {_common_nodes(slow, list(rates), hosts)}",
            cure="Look at that node's links (ibstat, nvidia-smi nvlink -e); leave it out: sbatch --exclude=NODE.",
        )  # fmt: skip
    if evidence.is_nominal:
        return CheckResult(name=name, status=Status.passed, measured=measured, expected=NOMINAL)
    worst = min(shares, key=shares.__getitem__)
    promised = rates[worst] / shares[worst]
    status = FIGURES.status(shares[worst])
    return CheckResult(
        name=name, status=status, measured=f"{measured}, over {len({hosts[m] for m in worst})} nodes",
        expected=f"{promised / 1e9:.3g} GB/s as planned for {evidence.run.cluster.name}",
        cure="" if status is Status.passed else SLOW_LINK,
    )  # fmt: skip


def _common_nodes(slow: list[tuple[int, ...]], everyone: list[tuple[int, ...]], hosts: list[str]) -> str:
    """The nodes that are in slow groups and in no good group. If there are none: all nodes of the slow groups."""
    good = {hosts[rank] for members in everyone if members not in slow for rank in members}
    count = Counter(host for members in slow for host in {hosts[rank] for rank in members})
    guilty = [host for host in count if host not in good] or list(count)
    return ", ".join(f"{host} (in {count[host]} of {len(slow)} slow groups)" for host in sorted(guilty)[:4])


def _alike(floor: Floor) -> str:
    return f"all above {floor.warned:.0%} of the median"


def node_links(evidence: PreflightEvidence) -> CheckResult:
    """Compares each node's speed with the better of its two partners. A slow node is slow with both."""
    name, cluster = "node links", evidence.run.cluster
    if not evidence.speeds:
        return not_checked(name, evidence.unmeasured or UNFINISHED)
    sent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for rank, speeds in evidence.speeds.items():
        for partner, rate in speeds.pairs.items():
            sent[evidence.facts[rank].host][partner] += rate
    if not sent:
        return not_checked(name, "one node")
    best = {node: max(rates.values()) for node, rates in sent.items()}
    usual, slowest = median(best.values()), min(best, key=best.__getitem__)
    floor = LIKE_LINKS[next(iter(evidence.speeds.values())).device]
    slow = sorted(node for node, rate in best.items() if floor.status(rate / usual) is not Status.passed)
    measured = f"{best[slowest] / 1e9:.3g} GB/s out of {slowest}, the slowest of {len(best)}; median {usual / 1e9:.3g}"
    if slow:
        return CheckResult(
            name=name, status=floor.status(best[slowest] / usual), measured=f"{measured}; slow: {', '.join(slow[:4])}",
            expected=_alike(floor), cure="Look at that node's ports (ibstat), or leave it out: sbatch --exclude=NODE.",
        )  # fmt: skip
    if evidence.is_nominal:
        return CheckResult(name=name, status=Status.passed, measured=measured, expected=NOMINAL)
    promised = promised_rate(cluster, "send", ["a", "b"]) * evidence.ranks_on_node
    status = FIGURES.status(best[slowest] / promised)
    return CheckResult(
        name=name, status=status, measured=measured,
        expected=f"{promised / 1e9:.3g} GB/s as planned for {cluster.name}",
        cure="" if status is Status.passed else SLOW_LINK,
    )  # fmt: skip


def bus_bytes(operation: str, size_bytes: float, num_ranks: int) -> float:
    """Bytes that each rank sends. bus_bytes / seconds is then a link's bandwidth for any number of ranks.

    With n ranks (nccl-tests, doc/PERFORMANCE.md) each sends 2(n-1)/n of the buffer in an all-reduce, (n-1)/n in an
    all-to-all, and all of it in a send.
    """
    shares = {"all_reduce": 2 * (num_ranks - 1) / num_ranks, "all_to_all": (num_ranks - 1) / num_ranks, "send": 1.0}
    return shares[operation] * size_bytes


def promised_rate(cluster: ClusterConfig, operation: str, hosts: list[str]) -> float:
    """Bus bandwidth that the planner assumes for a group, bytes per second.

    Args:
        hosts: the node of each member. Members of one node, or fewer than an NVLink domain holds, use NVLink.

    Between nodes every rank has its share of the ports. A ring uses the ports of all its members on a node at once, so
    its bandwidth is the sum of these ports. In an all-to-all only the part for other nodes passes the ports.
    """
    num_ranks = len(hosts)
    share = ALL_TO_ALL_SHARE if operation == "all_to_all" else RING_SHARE
    inside, outside = cluster.nvlink_bytes_per_second, cluster.fabric_bytes_per_second
    is_domain = cluster.devices_per_nvlink_domain > cluster.devices_per_node
    if len(set(hosts)) == 1 or (is_domain and num_ranks <= cluster.devices_per_nvlink_domain):
        return share * inside
    together = min(hosts.count(host) for host in set(hosts))
    if operation == "all_reduce":
        return share * min(inside, together * outside)
    if operation == "all_to_all":
        return share * min(inside, outside * (num_ranks - 1) / (num_ranks - together))
    return share * outside
