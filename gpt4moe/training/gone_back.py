"""The record of a run's goings back: gone_back.json in its folder. No torch, no collective.

    decide   step 47 went wrong -> a healthy checkpoint, of step 40 -> recorded: from here on the run goes on from 40
    launch   retention.latest_saved: 40, and later ones only if they were saved after the decision
    settle   those that were saved before it are renamed to left-step-*

The record is written whole, before anything else is done. A run that is killed at any moment after it begins again at
the same checkpoint and passes over the same samples. One that is killed before it comes to the same step again.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from gpt4moe.checkpoint.health import reasons
from gpt4moe.checkpoint.retention import LEFT, committed_steps, healthy_steps, set_aside, stale_steps
from gpt4moe.config.run import RunConfig
from gpt4moe.data.passed_over import GONE_BACK_FILE, GoingBack, PassedOver, gone_back_text, read_gone_back
from gpt4moe.durable import sync_folder
from gpt4moe.errors import DivergenceError
from gpt4moe.runlog.run_files import add_sums, drop_sum, replace_file

logger = logging.getLogger(__name__)


def decide(run_folder: Path, run: RunConfig, before: PassedOver, error: DivergenceError) -> GoingBack:
    """Records that the run goes back, to which checkpoint, and which samples it passes over from there.

    Args:
        before: what the run had passed over until now.
        error: of the step that went wrong.
    Raises: DivergenceError where it may not go back; DataError for a damaged record; OSError, and nothing is recorded.
    """
    limits, sizes, step = run.resilience, run.step_sizes, error.step
    _, times = read_gone_back(run_folder) or (before, [])
    healthy = [saved for saved in healthy_steps(run_folder / "checkpoints") if saved < step]
    to_step = _choose(run_folder / "checkpoints", healthy, limits.go_back_checkpoints, below=step)
    if to_step is None:
        raise DivergenceError(f"{error.cause} The run has no checkpoint to go back to.", error.cure)
    first = before.position(sizes.samples(to_step))
    size = sizes.at_step(step).global_batch_size
    end = before.position(sizes.samples(step - 1)) + size * (1 + limits.pass_over_steps)
    found = GoingBack(
        step=step, to_step=to_step, newest=healthy[-1] if healthy else to_step, samples=end - first,
        cause=error.cause, time=time.time(),
    )  # fmt: skip
    times = [*times, found]
    if in_a_row(times) > limits.max_go_backs:
        raise DivergenceError(
            f"{error.cause} The run has gone back {in_a_row(times) - 1} times in a row, at last to step "
            f"{times[-2].to_step} (resilience.max_go_backs).",
            f"{error.cure} Or set resilience.max_go_backs or pass_over_steps higher.",
        )
    record(run_folder, before.and_from(first, end), times)
    return found


def record(run_folder: Path, passed_over: PassedOver, times: Sequence[GoingBack] = ()) -> None:
    """Writes gone_back.json. No times: the run begins with a checkpoint of another that went back. Raises: OSError, and
    then the old record stands."""
    drop_sum(run_folder, GONE_BACK_FILE)
    replace_file(run_folder / GONE_BACK_FILE, gone_back_text(passed_over, list(times)).encode())
    try:
        add_sums(run_folder, GONE_BACK_FILE)  # its seal finds what changed in it, this that it is gone
        sync_folder(run_folder)
    except OSError as failed:  # a power failure alone could undo the record, and the run would then decide again
        logger.warning("%s: a power failure may undo the decision to go back: %s", run_folder, failed.strerror)


def in_a_row(times: list[GoingBack]) -> int:
    """How many at the end of the list had, after the first of them, no healthy checkpoint beyond its step."""
    count = 1
    while count < len(times) and all(it.newest < times[-1 - count].step for it in times[-count:]):
        count += 1
    return count


def _choose(checkpoints: Path, healthy: list[int], nth: int, below: int) -> int | None:
    """The nth newest healthy checkpoint, or the oldest one where there are fewer; the oldest suspect one where none is
    healthy; None: there is none."""
    if healthy:
        return healthy[-nth] if len(healthy) >= nth else healthy[0]
    return next((step for step in committed_steps(checkpoints) if step < below), None)


def settle(run_folder: Path) -> PassedOver | None:
    """Renames the checkpoints that the run went back from, also where a kill came between. Run folder locked.

    Returns: what the run passes over; None: it never went back.
    Raises: CheckpointError when one cannot be renamed; DataError for a damaged record.
    """
    found = read_gone_back(run_folder)
    for step in stale_steps(run_folder):
        set_aside(run_folder / "checkpoints", step, LEFT)
    return found and found[0]


def suspicion(folder: Path) -> str:
    """Why a checkpoint is suspect, in words; empty: it is healthy."""
    return "; ".join(reasons(folder))
