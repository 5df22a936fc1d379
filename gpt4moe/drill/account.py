"""What a drill showed: every step once and equal to the last bit; what each fault cost; availability two ways.

Availability is the share of the wall time that was not lost to a fault or a save:

    measured   by the trainer's own files (runlog.goodput): 1 - (start-up + redone + checkpoints + queue + down) / wall
    formula    1 - (save + lost work + detect + restart) x rate: means of a fault, by the drill's clock

Evaluations, reports, steps computed twice and what is between the steps are available time. So the share in which steps
that count were made (ETTR, effective training time ratio) is smaller: `productive`; its formula takes off these shares
too. All are over the time from the first step of the first launch to the end of the last.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from gpt4moe.checkpoint.retention import committed_steps, step_folder
from gpt4moe.drill.kinds import KINDS, RESUME, START, Fault
from gpt4moe.runlog.events_log import EVENTS_FILE, last_sign_of_life, read_events, written_at
from gpt4moe.runlog.goodput import PRODUCTIVE, by_launch, first_step_began, goodput, redone
from gpt4moe.runlog.metrics_log import METRICS_FILE, read_metrics

LONG = 30
"""From so many faults on, the two availabilities must agree: fewer are a matter of chance."""
MOST_POINTS = 3.0
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
    went_on_seconds: float = 0.0
    """Of these, those in which steps were still made: a full disk ends a run at its next save. The steps are redone."""
    restart_seconds: float | None = None
    """From there to the next first step, or to the next fault where that comes before it. None: neither came."""
    is_cut_off: bool = False
    """No first step came before the next fault: restart_seconds are not those of a whole restart."""
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
    """Without those in which steps were still made."""
    restart_seconds: float
    """Those that the next fault cut off are in it."""
    whole_restart_seconds: float | None
    """Mean of the restarts that no fault cut off; None: there was none."""
    shares: dict[str, float]
    """By the trainer's account: of each of goodput.CAUSES its share of the wall time; they add up to 1."""
    measured: float
    """1 less the shares that were lost to a fault or a save."""
    productive: float
    """Share in which steps that count were made: ETTR."""

    @property
    def cost_seconds(self) -> float:
        return self.save_seconds + self.lost_seconds + self.detect_seconds + self.restart_seconds

    @property
    def formula(self) -> float:
        return 1 - self.cost_seconds * self.faults / self.wall_seconds

    @property
    def productive_by_formula(self) -> float:
        return self.formula - (self.measured - self.productive)

    @property
    def points_apart(self) -> float:
        return 100 * abs(self.measured - self.formula)


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


def judge_arrivals(outcomes: Sequence[Outcome], came: Mapping[int, float]) -> None:
    """What did not happen is not survived. Args: came: number of a fault -> when it came, over all launches."""
    for outcome in outcomes:
        fault = outcome.fault
        if fault.number not in came:
            outcome.wrong = "it did not come"
            continue
        outcome.came_at = came[fault.number]
        if KINDS[fault.kind].statuses and outcome.status is None:
            outcome.wrong = "it came and ended no launch"


def add_restarts(outcomes: Sequence[Outcome], ends: Sequence[float], run_folder: Path) -> None:
    """Fills in what the trainer's events know: restarts and steps redone.

    Args:
        ends: for each outcome that ended a launch, in order, when no rank was left.
    """
    launches = by_launch(read_events(run_folder / EVENTS_FILE))
    ended = [outcome for outcome in outcomes if outcome.status is not None]
    redone_of = [redone(launches, key) for key in ("redone_steps", "redone_seconds")]
    for launch, steps, seconds in zip(launches, *redone_of, strict=True):
        # By when it came, not by when it ended: a bit in the data ends with the launch that finds it. A fault in a
        # start-up ended a launch without steps: those were lost to the fault before it.
        came = [it for it in ended if it.came_at < written_at(launch[0]) and it.fault.moment not in (START, RESUME)]
        if came:
            came[-1].redone_steps += int(steps)
            came[-1].redone_seconds += seconds
    first_steps = [began for launch in launches if (began := first_step_began(launch)) is not None]
    for index, (outcome, end) in enumerate(zip(ended, ends, strict=True)):
        following = next((launch[0] for launch in launches if written_at(launch[0]) > outcome.came_at), None)
        seen = (following or {}).get("last_sign_of_life") or 0.0
        outcome.went_on_seconds = min(max(0.0, seen - outcome.came_at), outcome.detect_seconds or 0.0)
        until = ended[index + 1].came_at if index + 1 < len(ended) else float("inf")
        begun = [began for began in first_steps if end <= began < until]
        outcome.is_cut_off = not begun
        outcome.restart_seconds = min([*begun, until]) - end if begun or isfinite(until) else None


def availability(outcomes: Sequence[Outcome], run_folder: Path, ended_at: float) -> Availability:
    """Args: ended_at: when the last launch had ended."""
    events, records = read_events(run_folder / EVENTS_FILE), read_metrics(run_folder / METRICS_FILE)
    account = goodput(events, records, last_sign_of_life=last_sign_of_life(run_folder, events))
    assert account is not None, "the run has events"
    before = account.attempts[0].seconds["start_up"]
    seconds = account.seconds | {"start_up": account.seconds["start_up"] - before}
    shares = {cause: its / (account.wall_seconds - before) for cause, its in seconds.items()}
    faults = [outcome for outcome in outcomes if outcome.status is not None]
    count = len(faults) or 1
    saves = sum(event["seconds"] for event in events if event["event"] == "checkpoint")
    whole = [it.restart_seconds for it in faults if it.restart_seconds is not None and not it.is_cut_off]
    began = next(began for launch in by_launch(events) if (began := first_step_began(launch)) is not None)
    return Availability(
        wall_seconds=ended_at - began,
        faults=len(faults),
        save_seconds=saves / count,
        lost_seconds=sum(outcome.redone_seconds for outcome in faults) / count,
        detect_seconds=sum((it.detect_seconds or 0.0) - it.went_on_seconds for it in faults) / count,
        restart_seconds=sum(outcome.restart_seconds or 0.0 for outcome in faults) / count,
        whole_restart_seconds=fmean(whole) if whole else None,
        shares=shares,
        measured=1 - sum(shares[cause] for cause in _LOST),
        productive=shares[PRODUCTIVE],
    )


def disagreement(it: Availability, faults: int) -> list[str]:
    """That the two availabilities of a long drill are too far apart; empty: they agree. Args: faults: of its plan."""
    if faults < LONG or it.points_apart <= MOST_POINTS:
        return []
    return [f"measured availability and formula are {it.points_apart:.1f} points apart, more than {MOST_POINTS:g}"]


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
