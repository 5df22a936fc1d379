"""What a drill showed: every step once and equal to the last bit; what each fault cost; availability two ways.

Availability (ETTR, effective training time ratio) is the share of the wall time in which steps that count were made:

    measured   by the trainer's own files (runlog.goodput): 1 - (start-up + redone + checkpoints + down) / wall
    formula    1 - (save + lost work + detect + restart) x rate: means of a fault, by the drill's clock

Both over the time from the first step of the first launch to the end of the last.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpt4moe.checkpoint.retention import committed_steps, step_folder
from gpt4moe.drill.kinds import Fault
from gpt4moe.runlog.events_log import EVENTS_FILE, last_sign_of_life, read_events, written_at
from gpt4moe.runlog.goodput import by_launch, goodput, redone
from gpt4moe.runlog.metrics_log import METRICS_FILE, read_metrics

_LOST = ("start_up", "redone", "checkpoint", "queue", "down")


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What became of one fault. Seconds are None where the fault ended no launch."""

    fault: Fault
    came_at: float = 0.0
    """Seconds since 1970."""
    status: int | None = None
    """Of the launch that it ended."""
    wrong: str = ""
    """What went another way than it should; empty: survived."""
    detect_seconds: float | None = None
    """From the fault until no rank was left; for a bit in the data until the launch that found it had ended."""
    restart_seconds: float | None = None
    """From there to the next first step, or to the next fault where that comes before it."""
    redone_steps: int = 0
    redone_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Availability:
    """Seconds are means a fault."""

    wall_seconds: float
    faults: int
    save_seconds: float
    lost_seconds: float
    detect_seconds: float
    restart_seconds: float
    measured: float
    """0 to 1."""

    @property
    def formula(self) -> float:
        cost = self.save_seconds + self.lost_seconds + self.detect_seconds + self.restart_seconds
        return 1 - cost * self.faults / self.wall_seconds


@dataclass(kw_only=True, slots=True)
class Result:
    """Of a whole drill."""

    seed: int
    ranks: int
    steps: int
    is_cold: bool
    outcomes: list[Outcome]
    wrong: list[str] = field(default_factory=list)
    """What is wrong with the run as a whole; empty: every step once, equal to the run without faults."""
    availability: Availability | None = None

    @property
    def is_good(self) -> bool:
        return not self.wrong and not any(outcome.wrong for outcome in self.outcomes)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"formula": self.availability and self.availability.formula, "is_good": self.is_good}


def add_restarts(outcomes: Sequence[Outcome], ends: Sequence[float], run_folder: Path) -> None:
    """Fills in what the trainer's events know: restarts and steps redone.

    Args:
        ends: for each outcome that ended a launch, in order, when no rank was left.
    """
    launches = by_launch(read_events(run_folder / EVENTS_FILE))
    ended = [outcome for outcome in outcomes if outcome.status is not None]
    redone_of = [redone(launches, key) for key in ("redone_steps", "redone_seconds")]
    for launch, steps, seconds in zip(launches, *redone_of, strict=True):
        before = [outcome for outcome, end in zip(ended, ends, strict=True) if end <= written_at(launch[0])]
        if before:
            before[-1].redone_steps += int(steps)
            before[-1].redone_seconds += seconds
    first_steps = [event for launch in launches for event in launch if event["event"] == "first_step"]
    for index, (outcome, end) in enumerate(zip(ended, ends, strict=True)):
        until = ended[index + 1].came_at if index + 1 < len(ended) else float("inf")
        begun = [event["time"] - event["seconds"] for event in first_steps if end <= event["time"] < until]
        outcome.restart_seconds = min([*begun, until]) - end


def availability(outcomes: Sequence[Outcome], run_folder: Path, ended_at: float) -> Availability:
    """Args: ended_at: when the last launch had ended."""
    events, records = read_events(run_folder / EVENTS_FILE), read_metrics(run_folder / METRICS_FILE)
    account = goodput(events, records, last_sign_of_life=last_sign_of_life(run_folder, events))
    assert account is not None, "the run has events"
    first = account.attempts[0]
    wall = account.wall_seconds - first.seconds["start_up"]
    lost = sum(account.seconds[cause] for cause in _LOST) - first.seconds["start_up"]
    faults = [outcome for outcome in outcomes if outcome.status is not None]
    count = len(faults) or 1
    saves = sum(event["seconds"] for event in events if event["event"] == "checkpoint")
    began = next(event["time"] - event["seconds"] for event in events if event["event"] == "first_step")
    return Availability(
        wall_seconds=ended_at - began,
        faults=len(faults),
        save_seconds=saves / count,
        lost_seconds=sum(outcome.redone_seconds for outcome in faults) / count,
        detect_seconds=sum(outcome.detect_seconds or 0.0 for outcome in faults) / count,
        restart_seconds=sum(outcome.restart_seconds or 0.0 for outcome in faults) / count,
        measured=1 - lost / wall,
    )


def differences(drilled: Path, plain: Path, steps: int) -> list[str]:
    """What the drilled run has that a run without faults has not; empty: nothing."""
    (own, wanted), wrong = ([read_metrics(folder / METRICS_FILE) for folder in (drilled, plain)]), []
    lines = (drilled / METRICS_FILE).read_text().splitlines()
    if [record["step"] for record in own] != list(range(1, steps + 1)) or len(lines) != steps:
        wrong.append(f"metrics.jsonl has {len(lines)} lines, and not each of {steps} steps once")
    for ours, theirs in zip(own, wanted, strict=False):
        for key in ("loss", "grad_norm", "eval_loss", "learning_rate"):
            if ours.get(key) != theirs.get(key):
                wrong.append(f"step {ours['step']}: {key} {ours.get(key)!r}, without faults {theirs.get(key)!r}")
    folders = [folder / "checkpoints" for folder in (drilled, plain)]
    if [committed_steps(folder)[-1:] for folder in folders] != [[steps]] * 2:
        return [*wrong, f"the last checkpoints are {[committed_steps(folder)[-1:] for folder in folders]}"]
    for file in step_folder(folders[1], steps).glob("*.safetensors"):
        if file.read_bytes() != (step_folder(folders[0], steps) / file.name).read_bytes():
            wrong.append(f"{file.name} of the last checkpoint is another")
    return wrong[:10]
