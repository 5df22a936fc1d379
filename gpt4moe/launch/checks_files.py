"""Checks of files: the data, the run folder, its free space, the write speed."""

from collections import defaultdict
from pathlib import Path

from gpt4moe.checkpoint.inspection_text import size
from gpt4moe.checkpoint.retention import committed_steps
from gpt4moe.config.data import DataKind
from gpt4moe.launch.checks_plan import ILLEGAL, save_seconds, span
from gpt4moe.launch.evidence import CheckResult, PreflightEvidence, Status, not_checked
from gpt4moe.launch.rank_files import BLOCKS
from gpt4moe.planner.run_time import STORAGE_RATE

LONG_STALL = 0.1
"""Share of a run's time that synchronous saves may take."""
NOT_WRITTEN = "nothing was written"


def data_readable(evidence: PreflightEvidence) -> CheckResult:
    """Whether every rank reads the data, and sampled blocks are the same on all."""
    expected = f"the trainer's check passes; equal sizes and {BLOCKS} equal blocks of each file on every rank"
    unread = [rank for rank, data in evidence.data.items() if not data.fingerprint]
    if unread:
        first = evidence.data[unread[0]]
        return CheckResult(
            name="data", status=Status.failed, expected=expected, cure=first.cure,
            measured=f"{evidence.named(unread)}: {first.cause}",
        )  # fmt: skip
    ranks = defaultdict(list)
    for rank, data in evidence.data.items():
        ranks[data.fingerprint].append(rank)
    usual = max(ranks, key=lambda fingerprint: len(ranks[fingerprint]))
    others = [rank for fingerprint, of in ranks.items() if fingerprint != usual for rank in of]
    if others:
        return CheckResult(
            name="data", status=Status.failed, expected=expected,
            measured=f"{evidence.named(sorted(others))} read other data than the other ranks",
            cure=f"Copy {', '.join(evidence.run.data.folders)} to those nodes again.",
        )  # fmt: skip
    if evidence.run.data.kind is DataKind.mock:
        return not_checked("data", "data=mock reads no token files")
    folders, count = ", ".join(evidence.run.data.folders), len(evidence.data)
    measured = f"{folders}: {usual} on {count} rank{'s' * (count > 1)}"
    return CheckResult(name="data", status=Status.passed, measured=measured, expected=expected)


def folder_shared(evidence: PreflightEvidence) -> CheckResult:
    """Whether run.root is writable and the same folder on all nodes, as checkpoints need."""
    name, root = "run folder", evidence.run.run.root
    expected = "writable, and the same on every node"
    if not evidence.disk:
        return not_checked(name, evidence.unmeasured or NOT_WRITTEN, expected)
    broken = [rank for rank, disk in evidence.disk.items() if disk.problem]
    if broken:
        return CheckResult(
            name=name, status=Status.failed, expected=expected,
            measured=f"{evidence.named(broken)}: {evidence.disk[broken[0]].problem}",
            cure="Set run.root to a folder that every node can write.",
        )  # fmt: skip
    blind = [rank for rank, disk in evidence.disk.items() if not disk.sees_first]
    if blind:
        return CheckResult(
            name=name, status=Status.failed, expected=expected,
            measured=f"{evidence.named(blind)} does not see rank 0's file in {root}",
            cure="Set run.root to a folder of a file system that all nodes mount.",
        )  # fmt: skip
    hosts = {facts.host for facts in evidence.facts.values()}
    measured = f"{Path(root).resolve()}, seen by all ranks of {len(hosts)} node{'s' * (len(hosts) > 1)}"
    return CheckResult(name=name, status=Status.passed, measured=measured, expected=expected)


def disk_space(evidence: PreflightEvidence) -> CheckResult:
    """Whether there is space for the checkpoints that the run keeps, minus those that exist already."""
    needs, run = evidence.needs, evidence.run
    if needs is None:
        return not_checked("disk space", ILLEGAL)
    free = [disk.free_bytes for disk in evidence.disk.values() if disk.free_bytes]
    if not free:
        return not_checked("disk space", evidence.unmeasured or NOT_WRITTEN)
    there = len(committed_steps(Path(run.run.root) / run.run.name / "checkpoints"))
    left = max(0, needs.num_checkpoints - there)
    need = left * needs.checkpoint_bytes
    expected = f"{size(need)}: {left} checkpoint{'s' * (left != 1)} of {size(needs.checkpoint_bytes)}"
    measured = f"{size(min(free))} free, quotas not seen"
    if need > min(free):
        fits = int(min(free) // needs.checkpoint_bytes) - 1
        keep = f"checkpoint.keep={fits} (and keep_every=0)" if fits >= 1 else "another run.root"
        return CheckResult(
            name="disk space", status=Status.failed, measured=measured, expected=expected,
            cure=f"Make room, or set {keep}.",
        )  # fmt: skip
    return CheckResult(name="disk space", status=Status.passed, measured=measured, expected=expected)


def write_speed(evidence: PreflightEvidence) -> CheckResult:
    """Whether saves are fast enough. The speed of each rank is measured while all ranks write at once."""
    needs, run = evidence.needs, evidence.run
    rates = {rank: disk.bytes_per_second for rank, disk in evidence.disk.items() if disk.bytes_per_second}
    if needs is None or not rates:
        return not_checked("write speed", ILLEGAL if needs is None else evidence.unmeasured or NOT_WRITTEN)
    slowest = min(rates, key=rates.__getitem__)
    save = save_seconds(evidence, needs)
    every = run.checkpoint.every or run.training.steps
    between = every * needs.step_seconds
    measured = (
        f"{sum(rates.values()) / 1e9:.3g} GB/s together, slowest {evidence.named([slowest])} with "
        f"{rates[slowest] / 1e9:.3g}: a save takes {span(save)}"
    )
    if run.checkpoint.asynchronous:
        most, expected = between, f"a save ends before the next begins, {span(between)} of steps"
    else:
        most, expected = LONG_STALL * between, f"saves take {LONG_STALL:.0%} of the time at most"
    cure = f"Set checkpoint.every={int(every * save / most) + 1} or more, or use faster storage."
    if save > most:
        return CheckResult(name="write speed", status=Status.failed, measured=measured, expected=expected, cure=cure)
    if not evidence.is_nominal and rates[slowest] < STORAGE_RATE:
        return CheckResult(
            name="write speed", status=Status.warned, measured=measured,
            expected=f"{STORAGE_RATE / 1e9:g} GB/s a rank, as the planner assumes",
            cure="Saves take longer than tools/plan.py says; training does not wait for asynchronous ones.",
        )  # fmt: skip
    return CheckResult(name="write speed", status=Status.passed, measured=measured, expected=expected)
