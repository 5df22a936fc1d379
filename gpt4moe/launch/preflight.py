"""The preflight from beginning to end. Every rank runs it; rank 0 collects the facts and runs the checks.

    facts, data    -->  which ranks are present, and are they equal   (no process group: some ranks may be missing)
    a file         -->  which ranks see it, and how fast was it written
    groups, times  -->  evidence --CHECKS--> results                  (only if groups can be made)

A rank that fails sends its problem with its next message, so that rank 0 can name it. Every wait has a time limit.
"""

import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import distributed

from gpt4moe.config.optimizer import Dtype
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import LaunchError
from gpt4moe.launch import checks_files, checks_plan, checks_ranks, checks_speed, rank_files
from gpt4moe.launch.evidence import WARNING_SECONDS, CheckResult, PreflightEvidence, Speeds, Status, Timed, needs
from gpt4moe.launch.facts import Gpu, RankFacts, rank_facts
from gpt4moe.launch.meeting import Meeting
from gpt4moe.launch.rank_files import DataFacts, DiskFacts, data_facts
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.kernel_problems import DeviceKind, kernel_problems
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import layout_problems, support_problems

COME_SECONDS = 180.0
"""Seconds that ranks may start apart: nodes boot, and all load Python from one file system."""
GROUP_SECONDS = 120.0
"""Seconds that one collective may take; the first one of thousands of ranks also makes the connections."""
MEASURE_SECONDS = 900.0
"""Seconds that all measurements together may take."""

CHECKS: tuple[Callable[[PreflightEvidence], CheckResult], ...] = (
    checks_ranks.ranks_came, checks_ranks.versions_equal, checks_ranks.gpus_present, checks_plan.layout_legal,
    checks_ranks.placement, checks_plan.device_memory, checks_plan.host_memory, checks_files.data_readable,
    checks_files.folder_shared, checks_files.disk_space, checks_files.write_speed, checks_plan.first_checkpoint,
    checks_plan.last_save, checks_speed.matrix_speed, checks_speed.node_links,
)  # fmt: skip


def preflight(
    run: RunConfig, environment: Environment, *, world_size: int, time_limit_seconds: float | None,
    warning_seconds: float = WARNING_SECONDS, come_seconds: float = COME_SECONDS,
) -> tuple[PreflightEvidence, list[CheckResult]] | int:  # fmt: skip
    """Collects facts, measures and judges. Every rank calls it.

    Args:
        world_size: ranks of the run. It may differ from the environment's only in a single process.
        time_limit_seconds: time limit of the training job.
        warning_seconds: seconds between the training job's --signal and that limit.
        come_seconds: how long rank 0 waits for the other ranks.
    Returns: evidence and results on rank 0; the exit status, as rank 0 broadcasts it, on the others.
    Raises: LaunchError if this rank does not reach rank 0.
    """
    meeting = Meeting.open(environment, come_seconds)
    facts, data = rank_facts(environment.local_rank), data_facts(run)
    meeting.send_to_first("facts", {"facts": asdict(facts), "data": asdict(data)})
    evidence = None
    if meeting.is_first:
        notes = meeting.collect("facts", range(environment.world_size), come_seconds)
        evidence = _gathered(run, world_size, environment.world_size, notes)
        evidence.time_limit_seconds, evidence.warning_seconds = time_limit_seconds, warning_seconds
        _say(f"{len(notes)} of {environment.world_size} ranks met")
    _write_files(run, meeting, evidence)
    _measure(run, environment, meeting, evidence)
    if evidence is None:
        status = int(meeting.receive("status", MEASURE_SECONDS))
        meeting.leave()
        return status
    results = judge(evidence)
    meeting.broadcast("status", exit_status(results))
    meeting.leave()
    return evidence, results


def judge(evidence: PreflightEvidence) -> list[CheckResult]:
    """The result of every check, in reading order."""
    return [*(check(evidence) for check in CHECKS), *checks_speed.group_speeds(evidence)]


def exit_status(results: list[CheckResult]) -> int:
    return int(any(result.status is Status.failed for result in results))


def _gathered(run: RunConfig, world_size: int, started: int, notes: dict[int, Any]) -> PreflightEvidence:
    problems = layout_problems(run.model, run.parallel, run.training, world_size)
    problems = problems or [
        *support_problems(run.model, run.parallel),
        *kernel_problems(run, DeviceKind.of_cluster(run.cluster)),
    ]
    layout = None if problems else Layout.from_config(run.parallel, world_size)
    facts = {rank: note["facts"] for rank, note in notes.items()}
    evidence = PreflightEvidence(
        run=run, world_size=world_size, started=started,
        facts={r: RankFacts(**{**f, "gpu": Gpu(**f["gpu"]) if f["gpu"] else None}) for r, f in facts.items()},
        data={rank: DataFacts(**note["data"]) for rank, note in notes.items()},
        problems=[(problem.cause, problem.cure) for problem in problems],
        layout=layout, needs=needs(run, layout) if layout else None,
    )  # fmt: skip
    evidence.unmeasured = _why_not(evidence)
    return evidence


def _why_not(evidence: PreflightEvidence) -> str:
    """Why groups cannot be made, or should not be tried; empty if they can."""
    if not evidence.is_whole:
        return f"{evidence.started} of {evidence.world_size} ranks is here"
    if evidence.missing:
        return "ranks are missing"
    if evidence.layout is None:
        return checks_plan.ILLEGAL
    for check in (checks_ranks.versions_equal, checks_ranks.gpus_present):
        if (found := check(evidence)).status is Status.failed:
            return f"ranks that differ may hang: see {found.name}"
    return ""


def _write_files(run: RunConfig, meeting: Meeting, evidence: PreflightEvidence | None) -> None:
    """All ranks write a file at the same time, then look for rank 0's."""
    if evidence is not None:
        size = evidence.needs.rank_state_bytes if evidence.needs else rank_files.LEAST_BYTES
        meeting.broadcast("folder", [*rank_files.begin(run), size, list(evidence.facts)])
    folder, problem, size, ranks = meeting.receive("folder", MEASURE_SECONDS)
    written = rank_files.write(Path(folder), meeting.rank, size) if folder else DiskFacts(problem=problem)
    meeting.send_to_first("written", asdict(written))
    if evidence is not None:
        found = meeting.collect("written", ranks, MEASURE_SECONDS)
        meeting.broadcast("all written", True)
    meeting.receive("all written", MEASURE_SECONDS)
    meeting.send_to_first("sees", bool(folder) and rank_files.sees(rank_files.probe_file(Path(folder), 0)))
    if evidence is not None:
        sees = meeting.collect("sees", found, MEASURE_SECONDS)
        evidence.disk = {rank: DiskFacts(**{**found[rank], "sees_first": sees.get(rank, False)}) for rank in found}
        meeting.broadcast("all looked", True)
    meeting.receive("all looked", MEASURE_SECONDS)
    if folder:
        rank_files.end(Path(folder))


def _measure(run: RunConfig, environment: Environment, meeting: Meeting, evidence: PreflightEvidence | None) -> None:
    """Makes the run's groups as the trainer does, and times them. Does nothing if rank 0 decides against it."""
    if evidence is not None:
        hosts = [] if evidence.unmeasured else evidence.hosts
        _say(f"groups are not measured: {evidence.unmeasured}" if evidence.unmeasured else "measuring groups ...")
        meeting.broadcast("hosts", hosts)
    hosts = meeting.receive("hosts", MEASURE_SECONDS)
    if not hosts:
        return
    meeting.send_to_first("speeds", _speeds(run, environment, meeting, hosts))
    if evidence is None:
        return
    notes = meeting.collect("speeds", range(environment.world_size), MEASURE_SECONDS)
    silent = {"problem": "no answer", "after_seconds": MEASURE_SECONDS}
    broken = {rank: notes.get(rank, silent) for rank in range(environment.world_size)}
    if broken := {rank: note for rank, note in broken.items() if "problem" in note}:
        evidence.broken = _problem_kinds(evidence, broken)
        return
    evidence.speeds = {
        rank: Speeds(**{**note, "messages": [Timed(**timed) for timed in note["messages"]]})
        for rank, note in notes.items()
    }


def _problem_kinds(evidence: PreflightEvidence, broken: dict[int, dict[str, Any]]) -> str:
    """The kinds of problem, earliest first. A failure on one rank makes collectives of other ranks fail later."""
    ranks = defaultdict(list)
    for rank, note in sorted(broken.items(), key=lambda item: item[1]["after_seconds"]):
        ranks[re.sub(r"[\d.:\[\]]+", "", note["problem"])].append(
            rank
        )  # texts that differ only in addresses are one kind
    texts = [f"{evidence.named(of)}: {broken[of[0]]['problem']}" for of in ranks.values()]
    return "; ".join(texts[:3])


def _speeds(run: RunConfig, environment: Environment, meeting: Meeting, hosts: list[str]) -> dict[str, object]:
    """This rank's Speeds, or its problem, as plain data."""
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a timeout then raises instead of ending the process
    import torch

    from gpt4moe.launch.speed import measure
    from gpt4moe.parallel.groups import ProcessGroups, world

    layout = Layout.from_config(run.parallel, environment.world_size)
    dtype = torch.bfloat16 if run.precision.dtype is Dtype.bf16 else torch.float32
    store, timeout = distributed.PrefixStore("groups", meeting.store), timedelta(seconds=GROUP_SECONDS)
    started = time.monotonic()
    try:
        with world(environment, store=store, timeout=timeout) as device:
            groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed, timeout=timeout)
            return asdict(measure(groups, hosts, dtype))
    except (RuntimeError, LaunchError) as error:  # from torch.distributed, and for a missing GPU
        return {"problem": str(error).splitlines()[0], "after_seconds": time.monotonic() - started}


def _say(text: str) -> None:
    sys.stderr.write(f"preflight: {text}\n")
    sys.stderr.flush()
