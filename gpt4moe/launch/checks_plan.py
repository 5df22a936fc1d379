"""Checks of the plan: is the layout legal, does it fit in memory, does the job reach its first checkpoint."""

import math

from gpt4moe.config.run import RunConfig
from gpt4moe.config.training import REPORT_SECONDS, WandbMode
from gpt4moe.launch.evidence import CheckResult, Needs, PreflightEvidence, Status, not_checked

LITTLE_HEADROOM = 0.05
"""Share of the memory that a plan should leave free, because a plan may be too low (docs/planner-error.md)."""
STARTUP_SECONDS = 180.0
"""Seconds from the start of a job to its first step (imports, groups, reading a checkpoint): an assumption."""
WANDB_SECONDS = 30.0
"""Seconds that an online wandb run may take to close (runlog.wandb_run.NETWORK_SECONDS)."""
ILLEGAL = "the layout is not legal"


def layout_legal(evidence: PreflightEvidence) -> CheckResult:
    """Whether the trainer's own check (parallel.legality) accepts the layout."""
    if evidence.problems:
        causes, cures = zip(*evidence.problems, strict=True)
        return CheckResult(
            name="layout", status=Status.failed, measured=" ".join(causes), expected="legal", cure=" ".join(cures)
        )
    assert evidence.layout is not None
    return CheckResult(name="layout", status=Status.passed, measured=evidence.layout.describe(), expected="legal")


def device_memory(evidence: PreflightEvidence) -> CheckResult:
    """The planned memory of the fullest rank against the memory of the smallest GPU found."""
    needs, cluster = evidence.needs, evidence.run.cluster
    if needs is None:
        return not_checked("device memory", ILLEGAL)
    gpus = [facts.gpu.memory_bytes for facts in evidence.facts.values() if facts.gpu is not None]
    if evidence.is_nominal and not gpus:
        return not_checked("device memory", "no GPU; the plan counts as host memory")
    has = min(gpus, default=cluster.memory_bytes)
    need = needs.fullest.total_bytes
    measured = f"{need / 1e9:.1f} GB planned on rank {needs.fullest.rank} (stage {needs.fullest.stage})"
    expected = f"{has / 1e9:.1f} GB of {'the smallest GPU' if gpus else f'cluster={cluster.name}'}"
    cure = (
        "Set parallel.recompute=full or recompute_layers=null, more of parallel.pp, tp or ep, or a smaller "
        "training.micro_batch_size; tools/plan.py ... search=true lists layouts that fit."
    )
    status = Status.passed
    if need > (1 - LITTLE_HEADROOM) * has:
        status = Status.failed if need > has else Status.warned
    return CheckResult(
        name="device memory", status=status, measured=measured, expected=expected,
        cure="" if status is Status.passed else cure,
    )  # fmt: skip


def host_memory(evidence: PreflightEvidence) -> CheckResult:
    """Whether each node has host memory for copies of asynchronous saves, an offloaded optimizer, or a run on CPUs."""
    needs, run = evidence.needs, evidence.run
    if needs is None:
        return not_checked("host memory", ILLEGAL)
    if not evidence.is_whole:
        return not_checked("host memory", f"{evidence.started} of {evidence.world_size} ranks is here")
    parts = {
        "a copy to save": needs.rank_state_bytes if run.checkpoint.asynchronous else 0.0,
        "the plan": needs.fullest.total_bytes if evidence.is_nominal else 0,
        "offloaded optimizer": needs.offloaded_bytes,
    }
    hosts = [facts.host for facts in evidence.facts.values()]
    need = {host: hosts.count(host) * sum(parts.values()) for host in set(hosts)}
    short = {rank: facts for rank, facts in evidence.facts.items() if facts.available_bytes < need[facts.host]}
    least = min(evidence.facts.values(), key=lambda facts: facts.available_bytes)
    what = " and ".join(name for name, size in parts.items() if size) or "nothing beyond this process"
    expected = f"{max(need.values()) / 1e9:.2f} GB a node: {what}"
    if short:
        least = min(short.values(), key=lambda facts: facts.available_bytes)
        return CheckResult(
            name="host memory", status=Status.failed, expected=expected,
            measured=f"{least.available_bytes / 1e9:.2f} GB available to {evidence.named(list(short))}",
            cure="Ask sbatch for more (--mem=0 is the whole node), start fewer ranks a node, or set "
            "checkpoint.asynchronous=false.",
        )  # fmt: skip
    measured = f"{least.available_bytes / 1e9:.2f} GB available on {least.host}"
    return CheckResult(name="host memory", status=Status.passed, measured=measured, expected=expected)


def first_checkpoint(evidence: PreflightEvidence) -> CheckResult:
    """Whether a job writes a checkpoint before its time limit. Without one it makes no progress."""
    needs, run, limit = evidence.needs, evidence.run, evidence.time_limit_seconds
    name = "first checkpoint"
    if needs is None:
        return not_checked(name, ILLEGAL)
    every = min(run.checkpoint.every or run.training.steps, run.training.steps)
    save = save_seconds(evidence, needs)
    seconds = STARTUP_SECONDS + every * needs.step_seconds + save
    measured = (
        f"after {span(seconds)} as planned: start {span(STARTUP_SECONDS)}, {every} steps of "
        f"{span(needs.step_seconds)}, save {span(save)}"
    )
    if limit is None:
        return not_checked(name, f"{measured}; no time limit is known", "time_limit=24:00:00, or a Slurm job with one")
    expected = f"before the time limit of {span(limit)}"
    if seconds <= limit:
        return CheckResult(name=name, status=Status.passed, measured=measured, expected=expected)
    fits = int((limit - STARTUP_SECONDS - save) / needs.step_seconds)
    cure = f"Set checkpoint.every={fits} or less, or a longer --time." if fits >= 1 else "Set a longer --time."
    return CheckResult(name=name, status=Status.failed, measured=measured, expected=expected, cure=cure)


def last_save(evidence: PreflightEvidence) -> CheckResult:
    """Whether the save that Slurm's signal starts ends before the time limit, in the worst case."""
    needs, name, warning = evidence.needs, "save on warning", evidence.warning_seconds
    expected = f"within {span(warning)}, by the training job's --signal"
    if needs is None:
        return not_checked(name, ILLEGAL)
    if not evidence.disk:
        return not_checked(name, "the write speed was not measured", expected)
    parts = _until_the_end(evidence.run, needs.step_seconds, save_seconds(evidence, needs))
    seconds = sum(parts.values())
    listed = ", ".join(f"{what} {span(part)}" for what, part in parts.items() if part)
    measured = f"{span(seconds)} at most, at the measured speed: {listed}"
    if seconds <= warning:
        return CheckResult(name=name, status=Status.passed, measured=measured, expected=expected)
    asked = f"B:USR1@{math.ceil(1.5 * seconds)}"
    return CheckResult(
        name=name, status=Status.failed, measured=measured, expected=expected,
        cure=f"Submit the training job with --signal={asked}, or export SBATCH_SIGNAL={asked} in slurm/cluster.env; "
        f"say signal={asked} here where it is not there. Or use faster storage. A job whose time limit ends before it "
        "has saved is not put back into the queue.",
    )  # fmt: skip


def _until_the_end(run: RunConfig, step: float, save: float) -> dict[str, float]:
    """Seconds from the signal to the end of the job, if the signal arrives just after a step has begun."""
    evaluates = run.training.eval_every > 0
    forward = step / 3  # a backward pass costs two forward passes
    return {
        "a step": step,
        "an evaluation": evaluates * forward * run.training.eval_samples / run.training.global_batch_size,
        "the save under way": save * run.checkpoint.asynchronous,
        "the save": save,
        "the report": REPORT_SECONDS,
        "wandb": WANDB_SECONDS * (run.tracking.wandb is WandbMode.online),
    }


def save_seconds(evidence: PreflightEvidence, needs: Needs) -> float:
    """Seconds to write a rank's share of a checkpoint at the slowest rank's measured speed; 0 if not measured."""
    rates = [disk.bytes_per_second for disk in evidence.disk.values() if disk.bytes_per_second]
    return needs.rank_state_bytes / min(rates) if rates else 0.0


def span(seconds: float) -> str:
    """0.25 s, 90 s, 12.5 min, 3.2 h."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
