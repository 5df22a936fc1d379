"""Sixteen healthy ranks on two nodes of eight H100, for tests that break one thing."""

from dataclasses import replace
from functools import cache
from typing import Any

from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.launch.checks_speed import bus_bytes, promised_rate
from gpt4moe.launch.evidence import Needs, PreflightEvidence, Speeds, Timed, needs
from gpt4moe.launch.facts import Gpu, RankFacts
from gpt4moe.launch.rank_files import DataFacts, DiskFacts
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import Problem, layout_problems
from gpt4moe.planner.efficiency import planning_profile

BASE = (
    "+experiment=tiny", "run.name=x", "data.path=corpus", "precision=bf16", "cluster=h100_80g",
    "parallel.tp=4", "parallel.pp=2", "parallel.ep=2", "training.global_batch_size=16",
    "model.num_attention_heads=4", "model.num_query_groups=4",
)  # fmt: skip
VERSIONS = {
    "python": "3.11.7", "torch": "2.13.0", "megatron-core": "0.16.1", "deepspeed": "0.19.8", "gpt4moe": "0.1.0 abc",
    "NCCL": "2.27.3",
}  # fmt: skip
RANKS, PER_NODE = 16, 8
SIZE = 256 << 20
OPERATIONS = {
    "tp": ("all_reduce", "all_to_all"), "ep": ("all_reduce", "all_to_all"), "dp_cp": ("all_reduce", "all_to_all"),
    "expert_dp": ("all_reduce", "all_to_all"), "pp": ("send",),
}  # fmt: skip


def scene(*overrides: str, time_limit_seconds: float | None = 86400.0) -> PreflightEvidence:
    """Everything as the cluster's figures promise."""
    run, problems, layout, needed = planned(overrides)
    evidence = PreflightEvidence(
        run=run, world_size=RANKS, started=RANKS, facts={rank: facts(rank) for rank in range(RANKS)},
        data={rank: DataFacts(fingerprint="c0ffee") for rank in range(RANKS)},
        problems=[(problem.cause, problem.cure) for problem in problems], needs=needed, layout=layout,
        time_limit_seconds=time_limit_seconds,
        disk={
            rank: DiskFacts(free_bytes=10**12, bytes_per_second=2e9, sees_first=True) for rank in range(RANKS)
        },
    )  # fmt: skip
    evidence.speeds = {rank: speeds(evidence, rank) for rank in range(RANKS)} if layout else {}
    return evidence


@cache
def planned(overrides: tuple[str, ...]) -> tuple[RunConfig, list[Problem], Layout | None, Needs | None]:
    run = load_run_config([*BASE, *overrides])
    problems = layout_problems(run.model, run.parallel, run.training, RANKS)
    layout = None if problems else Layout.from_config(run.parallel, RANKS)
    return run, problems, layout, needs(run, layout) if layout else None


def facts(rank: int) -> RankFacts:
    gpu = Gpu(name="H100", identity=f"gpu-{rank}", memory_bytes=int(85.2e9), free_bytes=int(84.5e9))
    return RankFacts(host=f"node{rank // PER_NODE}", versions=dict(VERSIONS), available_bytes=10**12, gpu=gpu)


def speeds(evidence: PreflightEvidence, rank: int) -> Speeds:
    layout, cluster = evidence.layout, evidence.run.cluster
    assert layout is not None
    timed = []
    for kind, operations in OPERATIONS.items():
        members = layout.members(kind, rank)
        if len(members) == 1:
            continue
        for operation in operations:
            rate = promised_rate(cluster, operation, [evidence.hosts[member] for member in members])
            seconds = bus_bytes(operation, SIZE, len(members)) / rate
            timed.append(Timed(group=kind, operation=operation, size_bytes=SIZE, seconds=seconds))
    other = f"node{1 - rank // PER_NODE}"
    flops = cluster.peak_flops_bf16 * planning_profile(cluster.generation).matrix
    return Speeds(
        device="cuda", matrix_flops=flops, messages=timed,
        pairs={other: promised_rate(cluster, "send", ["a", "b"])},
    )  # fmt: skip


def with_facts(evidence: PreflightEvidence, ranks: list[int], **changes: Any) -> PreflightEvidence:
    """The scene, with other facts of some ranks."""
    evidence.facts |= {rank: replace(evidence.facts[rank], **changes) for rank in ranks}
    return evidence


def with_gpu(evidence: PreflightEvidence, ranks: list[int], **changes: Any) -> PreflightEvidence:
    for rank in ranks:
        gpu = evidence.facts[rank].gpu
        assert gpu is not None
        with_facts(evidence, [rank], gpu=replace(gpu, **changes))
    return evidence


def slowed(evidence: PreflightEvidence, ranks: list[int], kind: str, factor: float) -> PreflightEvidence:
    """The scene, with messages of one kind of group that take longer on some ranks."""
    for rank in ranks:
        told = evidence.speeds[rank]
        messages = [replace(t, seconds=t.seconds * factor) if t.group == kind else t for t in told.messages]
        evidence.speeds[rank] = replace(told, messages=messages)
    return evidence
