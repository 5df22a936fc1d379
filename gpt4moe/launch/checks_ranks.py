"""Checks of ranks and their machines: all present, equal versions, a GPU each, good placement on nodes."""

from collections import Counter, defaultdict

from gpt4moe.launch.evidence import CheckResult, PreflightEvidence, Status, not_checked
from gpt4moe.parallel.layout import Layout

LEAST_GPU_SHARE = 0.95
"""Share of cluster.memory_bytes that a GPU must have; less than 1, because drivers keep some."""
LEAST_FREE_SHARE = 0.95
"""Share of a GPU's memory that must be free before the run."""


def ranks_came(evidence: PreflightEvidence) -> CheckResult:
    expected = f"{evidence.world_size} rank{'s' * (evidence.world_size > 1)}"
    hosts = Counter(facts.host for facts in evidence.facts.values())
    if evidence.missing:
        return CheckResult(
            name="ranks", status=Status.failed, expected=expected,
            measured=f"{evidence.named(evidence.missing)} did not come; {len(hosts)} nodes answered",
            cure="Look at those ranks' output; their node may be down, or python or the checkout missing there.",
        )  # fmt: skip
    if not evidence.is_whole:
        return not_checked("ranks", "one process, asked of a larger run", expected)
    per_node = sorted(set(hosts.values()))
    measured = f"{evidence.started} on {len(hosts)} node{'s' * (len(hosts) > 1)}"
    if len(per_node) > 1:
        return CheckResult(
            name="ranks", status=Status.warned, measured=f"{measured}, {per_node[0]} to {per_node[-1]} a node",
            expected="as many on every node", cure="Give sbatch --ntasks-per-node instead of --ntasks.",
        )  # fmt: skip
    return CheckResult(name="ranks", status=Status.passed, measured=measured, expected=expected)


def versions_equal(evidence: PreflightEvidence) -> CheckResult:
    names = sorted({name for facts in evidence.facts.values() for name in facts.versions})
    others = []
    for name in names:
        ranks = defaultdict(list)
        for rank, facts in evidence.facts.items():
            ranks[facts.versions.get(name, "none")].append(rank)
        usual = max(ranks, key=lambda value: len(ranks[value]))
        others += [
            f"{name} {value} on {evidence.named(of)}, {usual} elsewhere"
            for value, of in ranks.items()
            if value != usual
        ]
    if others:
        return CheckResult(
            name="versions", status=Status.failed, measured="; ".join(others), expected="equal on every rank",
            cure="Use one environment and one checkout on all nodes: a shared folder, or a container (cluster.env).",
        )  # fmt: skip
    mine = evidence.facts[min(evidence.facts)].versions
    shown = ", ".join(f"{name} {mine[name]}" for name in ("python", "torch", "megatron-core", "deepspeed", "gpt4moe"))
    more = [f"{name} {mine[name]}" for name in ("CUDA", "NCCL") if name in mine]
    return CheckResult(
        name="versions", status=Status.passed, measured=", ".join([shown, *more]), expected="equal on every rank"
    )


def gpus_present(evidence: PreflightEvidence) -> CheckResult:
    """Whether each rank has a GPU of its own, with the cluster's memory and no other process on it."""
    cluster = evidence.run.cluster
    expected = f"{cluster.name}: {cluster.memory_bytes / 1e9:.1f} GB, one for each rank"
    gpus = {rank: facts.gpu for rank, facts in evidence.facts.items()}
    if evidence.is_nominal and not any(gpus.values()):
        return not_checked("GPUs", "cluster=cpu, and no rank has one")
    if not evidence.is_whole:
        return not_checked("GPUs", f"{evidence.started} of {evidence.world_size} ranks is here", expected)

    def failed(ranks: list[int], what: str, cure: str) -> CheckResult:
        measured = f"{evidence.named(ranks)} {what}"
        return CheckResult(name="GPUs", status=Status.failed, measured=measured, expected=expected, cure=cure)

    without = [rank for rank, gpu in gpus.items() if gpu is None]
    if without:
        return failed(
            without, "without a GPU", "Ask sbatch for one a task (SBATCH_GPUS_PER_NODE in cluster.env), or cluster=cpu."
        )
    owners = defaultdict(list)
    for rank, gpu in gpus.items():
        assert gpu is not None
        owners[evidence.facts[rank].host, gpu.identity].append(rank)
    shared = [rank for ranks in owners.values() if len(ranks) > 1 for rank in ranks]
    if shared:
        return failed(shared, "share a GPU", "Start at most as many tasks a node as it has GPUs.")
    found = {rank: gpu for rank, gpu in gpus.items() if gpu is not None}
    small = [rank for rank, gpu in found.items() if gpu.memory_bytes < LEAST_GPU_SHARE * cluster.memory_bytes]
    if small:
        least = min(found[rank].memory_bytes for rank in small)
        return failed(small, f"with {least / 1e9:.1f} GB", "Choose the cluster=... that these GPUs are.")
    taken = [rank for rank, gpu in found.items() if gpu.free_bytes < LEAST_FREE_SHARE * gpu.memory_bytes]
    if taken:
        least = min(found[rank].free_bytes for rank in taken)
        return failed(taken, f"with only {least / 1e9:.1f} GB free", "End the processes that nvidia-smi shows there.")
    names = sorted({gpu.name for gpu in found.values()})
    status, cure = (
        (Status.warned, "Mixed GPUs run at the slowest one's pace.") if len(names) > 1 else (Status.passed, "")
    )
    measured = f"{len(found)} x {' and '.join(names)}, {min(gpu.memory_bytes for gpu in found.values()) / 1e9:.1f} GB"
    return CheckResult(name="GPUs", status=status, measured=measured, expected=expected, cure=cure)


def placement(evidence: PreflightEvidence) -> CheckResult:
    """Whether tp and etp groups are within a node, and ep and cp groups on as few nodes as possible."""
    layout, cluster = evidence.layout, evidence.run.cluster
    if layout is None:
        return not_checked("placement", "the layout is not legal")
    expected = "tp and etp within a node, ep and cp over as few as hold them"
    if evidence.missing:
        return not_checked("placement", "ranks are missing", expected)
    hosts, per_node = evidence.hosts, evidence.ranks_on_node
    spans = {name: _most_nodes(layout, name, hosts) for name in ("tp", "etp", "ep", "cp", "pp")}
    fewest = {name: -(-getattr(layout, name) * (layout.etp if name == "ep" else 1) // per_node) for name in spans}
    shown = ", ".join(f"{name} {nodes}" for name, nodes in spans.items() if getattr(layout, name) > 1)
    measured = f"nodes of a group: {shown or 'one rank in each'}" + ("" if evidence.is_whole else ", as planned")
    torn = [name for name in ("tp", "etp") if spans[name] > 1]
    wide = [name for name in ("ep", "cp") if spans[name] > fewest[name]]
    if torn and max(getattr(layout, name) for name in torn) > _reach(evidence):
        return CheckResult(
            name="placement", status=Status.failed, measured=measured, expected=expected,
            cure=f"Set parallel.{torn[0]} to a divisor of the {per_node} ranks of a node, or start ranks in order: "
            "srun's --distribution=block.",
        )  # fmt: skip
    if wide or torn:
        cure = "Start ranks in order: srun's --distribution=block, --ntasks-per-node a multiple of tp."
        if torn:
            cure = f"Make sure that the nodes share an NVLink domain of {cluster.devices_per_nvlink_domain}."
        return CheckResult(name="placement", status=Status.warned, measured=measured, expected=expected, cure=cure)
    return CheckResult(name="placement", status=Status.passed, measured=measured, expected=expected)


def _most_nodes(layout: Layout, name: str, hosts: list[str]) -> int:
    """Of all groups of a kind: the nodes of the group that spans the most nodes."""
    firsts = [rank for rank in range(layout.world_size) if layout.coordinate(rank)[name] == 0]
    return max(len({hosts[member] for member in layout.members(name, rank)}) for rank in firsts)


def _reach(evidence: PreflightEvidence) -> int:
    """Ranks that an NVLink domain larger than a node connects; 0 if NVLink ends at the node."""
    cluster = evidence.run.cluster
    return cluster.devices_per_nvlink_domain if cluster.devices_per_nvlink_domain > cluster.devices_per_node else 0
