"""Every check of a preflight passes on a healthy cluster, and finds what is planted."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gpt4moe.launch.checks_files import data_readable, disk_space, folder_shared, write_speed
from gpt4moe.launch.checks_plan import (
    WANDB_SECONDS,
    device_memory,
    first_checkpoint,
    host_memory,
    last_save,
    layout_legal,
)
from gpt4moe.launch.checks_ranks import gpus_present, placement, ranks_came, versions_equal
from gpt4moe.launch.checks_speed import group_speeds, matrix_speed, node_links
from gpt4moe.launch.command import warning_of
from gpt4moe.launch.evidence import WARNING_SECONDS, CheckResult, PreflightEvidence, Status
from gpt4moe.launch.preflight import exit_status, judge
from gpt4moe.launch.rank_files import DataFacts, DiskFacts
from gpt4moe.runlog.wandb_run import NETWORK_SECONDS
from tests.launch.scene import VERSIONS, scene, slowed, with_facts, with_gpu

ROOT = Path(__file__).resolve().parents[2]
Check = Callable[[PreflightEvidence], CheckResult]


def without(evidence: PreflightEvidence, rank: int) -> PreflightEvidence:
    del evidence.facts[rank], evidence.data[rank], evidence.disk[rank]
    evidence.speeds, evidence.unmeasured = {}, "ranks are missing"
    return evidence


def on_disk(evidence: PreflightEvidence, ranks: list[int], **changes: object) -> PreflightEvidence:
    evidence.disk |= {rank: replace(evidence.disk[rank], **changes) for rank in ranks}
    return evidence


def of_data(evidence: PreflightEvidence, rank: int, facts: DataFacts) -> PreflightEvidence:
    evidence.data[rank] = facts
    return evidence


def at_flops(evidence: PreflightEvidence, ranks: list[int], factor: float) -> PreflightEvidence:
    for rank in ranks:
        told = evidence.speeds[rank]
        evidence.speeds[rank] = replace(told, matrix_flops=told.matrix_flops * factor)
    return evidence


def between_nodes(evidence: PreflightEvidence, factor: float) -> PreflightEvidence:
    for rank, told in evidence.speeds.items():
        pairs = {node: rate * factor for node, rate in told.pairs.items()}
        evidence.speeds[rank] = replace(told, pairs=pairs)
    return evidence


def in_turns(evidence: PreflightEvidence) -> PreflightEvidence:
    """Rank r on node r % 2, as srun's --distribution=cyclic has it."""
    for rank in evidence.facts:
        with_facts(evidence, [rank], host=f"node{rank % 2}")
    return evidence


def test_a_healthy_cluster_passes_every_check() -> None:
    results = judge(scene())
    assert {r.name: r.measured for r in results if r.status is not Status.passed} == {"cp, etp": "groups of one rank"}
    assert exit_status(results) == 0
    assert {"tp all-reduce", "ep all-to-all", "dp_cp all-reduce", "pp send"} <= {r.name for r in results}
    assert not any(result.cure for result in results)


ALL = list(range(16))
UNREADABLE = DataFacts(fingerprint="", cause="data.path=corpus does not exist.", cure="Run `make data`.")
FAULTS: dict[str, tuple[Check, Callable[[], PreflightEvidence], tuple[str, ...]]] = {
    "a rank that does not come": (ranks_came, lambda: without(scene(), 5), ("rank 5 did not come",)),
    "another torch on one rank": (
        versions_equal, lambda: with_facts(scene(), [11], versions=VERSIONS | {"torch": "2.8.0"}),
        ("torch 2.8.0 on rank 11 (node1), 2.13.0 elsewhere",),
    ),
    "a node without a package": (
        versions_equal, lambda: with_facts(scene(), [8, 9], versions={"python": "3.11.7"}),
        ("NCCL none on ranks 8, 9 (node1)", "deepspeed none"),
    ),
    "a rank without a GPU": (
        gpus_present, lambda: with_facts(scene(), [3], gpu=None), ("rank 3 (node0) without a GPU",)
    ),
    "two ranks on one GPU": (
        gpus_present, lambda: with_gpu(scene(), [6, 7], identity="one"), ("ranks 6, 7 (node0) share a GPU",)
    ),
    "a smaller GPU": (gpus_present, lambda: with_gpu(scene(), [1], memory_bytes=40 * 10**9), ("with 40.0 GB",)),
    "somebody else's process": (
        gpus_present, lambda: with_gpu(scene(), [9], free_bytes=20 * 10**9), ("rank 9 (node1) with only 20.0 GB free",)
    ),
    "a layout that does not divide": (layout_legal, lambda: scene("parallel.tp=3"), ("does not divide the 16 ranks",)),
    "ranks dealt out in turns": (placement, lambda: in_turns(scene()), ("tp 2",)),
    "tp over two nodes": (
        placement,
        lambda: scene("parallel.tp=16", "parallel.pp=1", "model.num_attention_heads=16", "model.num_query_groups=16"),
        ("tp 2",),
    ),
    "a model too large": (
        device_memory, lambda: scene("model.hidden_size=16384", "model.moe.ffn_hidden_size=65536"),
        ("GB planned on rank",),
    ),
    "little host memory": (
        host_memory, lambda: with_facts(scene(), [8], available_bytes=10**6), ("available to rank 8 (node1)",)
    ),
    "no data on one rank": (
        data_readable, lambda: of_data(scene(), 13, UNREADABLE), ("rank 13 (node1): data.path=corpus does not exist",)
    ),
    "other data on one rank": (
        data_readable, lambda: of_data(scene(), 2, DataFacts(fingerprint="beef")), ("rank 2 (node0) read other data",)
    ),
    "a root that cannot be written": (
        folder_shared, lambda: on_disk(scene(), [4], problem="runs cannot be written: Read-only file system"),
        ("rank 4 (node0)", "Read-only"),
    ),
    "a root of one node": (
        folder_shared, lambda: on_disk(scene(), ALL[8:], sees_first=False), ("node1", "does not see rank 0's file")
    ),
    "too little disk": (disk_space, lambda: on_disk(scene(), ALL, free_bytes=10**8), ("100 MB free",)),
    "storage too slow for the interval": (
        write_speed, lambda: on_disk(scene("checkpoint.every=1"), [12], bytes_per_second=1e3),
        ("slowest rank 12 (node1)",),
    ),
    "synchronous saves that hold training up": (
        write_speed,
        lambda: on_disk(scene("checkpoint.every=1", "checkpoint.asynchronous=false"), ALL, bytes_per_second=1e6),
        ("a save takes",),
    ),
    "a time limit too short": (
        first_checkpoint, lambda: scene(time_limit_seconds=120.0), ("after", "start 3 min", "50 steps")
    ),
    "a warning too short": (
        last_save, lambda: on_disk(scene("training.eval_every=5"), [1], bytes_per_second=1e5),
        ("at the measured speed", "an evaluation", "the save under way", "the report 20 s"),
    ),
    "a slow rank": (matrix_speed, lambda: at_flops(scene(), [10], 0.5), ("slow: rank 10 (node1)",)),
    "another GPU than cluster=...": (matrix_speed, lambda: at_flops(scene(), ALL, 0.3), ("median",)),
    "a node with slow ports": (node_links, lambda: between_nodes(scene(), 0.1), ("the slowest of 2",)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_its_check_and_says_where_and_what_to_do(fault: str) -> None:
    check, planted, words = FAULTS[fault]
    evidence = planted()
    result = check(evidence)
    assert result.status is Status.failed
    assert result.cure
    for word in words:
        assert word in result.measured
    assert exit_status(judge(evidence)) == 1


def test_a_slow_group_is_named_by_the_node_that_good_groups_have_not() -> None:
    results = {r.name: r for r in group_speeds(slowed(scene(), [8, 9, 10, 11], "tp", 3.0))}
    assert results["tp all-reduce"].status is Status.failed
    assert "slow: node1 (in 1 of 1 slow groups)" in results["tp all-reduce"].measured
    assert results["ep all-to-all"].status is Status.passed


def test_groups_that_are_all_slow_fail_by_the_clusters_figures() -> None:
    results = {r.name: r for r in group_speeds(slowed(scene(), ALL, "pp", 4.0))}
    assert (results["pp send"].status, results["pp send"].expected) == (
        Status.failed,
        "40 GB/s as planned for h100_80g",
    )


def test_a_measurement_that_breaks_off_is_a_failure_not_an_omission() -> None:
    evidence = scene()
    evidence.speeds, evidence.broken = {}, "rank 3 (node0): Connection refused"
    results = {r.name: r for r in judge(evidence)}
    assert results["groups"].status is Status.failed
    assert results["matrix products"].status is Status.not_checked


def test_small_shortfalls_are_warnings_and_leave_the_status_0() -> None:
    evidence = slowed(scene(), ALL, "tp", 1.2)
    evidence = with_gpu(at_flops(evidence, ALL, 0.8), [5], name="H100 PCIe")
    evidence = on_disk(evidence, ALL, bytes_per_second=5e8)
    results = judge(evidence)
    warned = {result.name for result in results if result.status is Status.warned}
    assert warned == {"GPUs", "write speed", "matrix products", "tp all-reduce", "tp all-to-all"}
    assert exit_status(results) == 0


def test_expert_groups_over_more_nodes_than_they_need_are_a_warning() -> None:
    evidence = scene(
        "parallel.tp=1", "parallel.ep=8", "parallel.pp=1", "model.moe.num_experts=8", "training.micro_batch_size=1"
    )
    assert placement(evidence).status is Status.passed
    for rank in (7, 8):
        with_facts(evidence, [rank], host="node1" if rank == 7 else "node0")
    assert placement(evidence).status is Status.warned


def test_tensor_parallelism_over_nodes_of_one_nvlink_domain_is_a_warning() -> None:
    wide = ("parallel.tp=16", "parallel.pp=1", "model.num_attention_heads=16", "model.num_query_groups=16")
    assert placement(scene(*wide, "cluster=gb200")).status is Status.warned


def test_what_an_illegal_layout_leaves_open_is_said_not_passed() -> None:
    results = {result.name: result for result in judge(scene("parallel.tp=3"))}
    for name in ("placement", "device memory", "host memory", "disk space", "write speed", "first checkpoint"):
        assert (results[name].status, results[name].measured) == (Status.not_checked, "the layout is not legal")


def test_a_cpu_without_figures_is_judged_by_its_likes_alone() -> None:
    evidence = scene("cluster=cpu")
    for rank in evidence.facts:
        with_facts(evidence, [rank], gpu=None)
        evidence.speeds[rank] = replace(evidence.speeds[rank], device="cpu")
    assert gpus_present(evidence).status is Status.not_checked
    assert matrix_speed(at_flops(evidence, ALL, 0.01)).status is Status.passed
    assert matrix_speed(at_flops(evidence, [7], 0.1)).status is Status.failed


def test_checkpoints_that_lie_there_already_need_no_more_space(tmp_path: Path) -> None:
    evidence = scene(f"run.root={tmp_path}", "training.steps=1000")
    assert disk_space(evidence).expected.endswith("4 checkpoints of 91.3 MB")
    for step in (50, 100):
        folder = tmp_path / "x" / "checkpoints" / f"step-{step:08}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    assert disk_space(evidence).expected.endswith("2 checkpoints of 91.3 MB")


@pytest.mark.parametrize(
    ("overrides", "most"),
    [((), 4), (("checkpoint.keep=0",), 20), (("checkpoint.every=0",), 1), (("checkpoint.keep_every=500",), 6)],
)
def test_space_is_for_the_newest_the_kept_and_the_one_being_written(overrides: tuple[str, ...], most: int) -> None:
    needed = scene("training.steps=1000", *overrides).needs
    assert needed is not None and needed.num_checkpoints == most


def test_the_cure_of_a_warning_too_short_cures() -> None:
    evidence = on_disk(scene("tracking.wandb=online"), [1], bytes_per_second=1e5)
    found = last_save(evidence)
    assert found.status is Status.failed and f"wandb {WANDB_SECONDS:g} s" in found.measured
    cure = found.cure.partition("signal=")[2].split(",")[0]
    evidence.warning_seconds = warning_of(cure)
    assert last_save(evidence).status is Status.passed


def test_what_the_check_counts_is_what_the_trainer_allows_itself() -> None:
    assert WANDB_SECONDS == NETWORK_SECONDS


def test_memory_is_planned_for_the_engine_of_the_run() -> None:
    assert device_memory(scene("engine=deepspeed")).status is Status.passed


def test_the_warning_is_the_one_that_the_training_job_asks_slurm_for() -> None:
    assert f"#SBATCH --signal=B:USR1@{WARNING_SECONDS:.0f}" in (ROOT / "slurm/train.sh").read_text().splitlines()


def test_no_disk_was_seen_no_disk_is_judged() -> None:
    evidence = scene()
    evidence.disk = {0: DiskFacts(problem="runs cannot be written: Permission denied")}
    assert folder_shared(evidence).status is Status.failed
    assert disk_space(evidence).status is Status.not_checked
    assert write_speed(evidence).status is Status.not_checked
