"""The drill itself: the same command again and again, a fault in each launch, until the run is done."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gpt4moe.drill.account import (
    Outcome,
    Result,
    add_restarts,
    availability,
    differences,
    disagreement,
    judge_arrivals,
)
from gpt4moe.drill.kinds import KINDS, Fault, of_launch
from gpt4moe.drill.launches import Ended, launch, warm_up
from gpt4moe.drill.scene import DRILLED, PLAIN, Scene, flip_a_bit
from gpt4moe.errors import LaunchError


@dataclass(frozen=True, kw_only=True, slots=True)
class Drill:
    """One drill. Args: say: called with a line for each fault."""

    scene: Scene
    plan: list[Fault]
    seed: int
    is_cold: bool
    hang_seconds: float
    say: Callable[[str], None]
    damaged: dict[int, tuple[Outcome, str]] = field(default_factory=dict)
    """Inode of a step folder in which a bit was flipped -> whose fault it is, its name. A renamed folder keeps its
    inode."""

    def run(self) -> Result:
        """Builds the scene, drills the run `drilled`, then makes the run `plain` without faults and compares.

        Raises: LaunchError when a launch ends without a fault that could be why.
        """
        self.scene.build()
        if not self.is_cold:
            warm_up()
        outcomes = [Outcome(fault=fault) for fault in self.plan]
        result = Result(
            seed=self.seed, ranks=self.scene.ranks, steps=self.scene.steps, is_cold=self.is_cold, outcomes=outcomes
        )
        left, ends, own = list(self.plan), [], random.Random(self.seed)
        came: dict[int, float] = {}
        while True:
            faults = of_launch(left)
            ended = self._launch(faults)
            came |= ended.came
            if ended.status == 0:
                break
            if not faults:
                raise LaunchError(f"A launch without faults ended with {ended.status}.", ended.log[-2000:])
            last = outcomes[faults[-1].number - 1]
            ends.append(self._judge(last, ended, own))
            self.say(_line(last))
            # A fault that ends no launch may have had no moment in this one: the next has it again.
            left = [fault for fault in left if fault.number not in came]
        judge_arrivals(outcomes, came)
        folder = self.scene.run_folder(DRILLED)
        add_restarts(outcomes, ends, folder)
        result.availability = availability(outcomes, folder, ended.at)
        plain = launch(self.scene, PLAIN, [], is_cold=self.is_cold, hang_seconds=self.hang_seconds)
        if plain.status:
            raise LaunchError(f"The run without faults ended with {plain.status}.", plain.log[-2000:])
        result.wrong = differences(folder, self.scene.run_folder(PLAIN), self.scene.steps)
        result.wrong += self._judge_damaged(folder / "checkpoints")
        result.wrong += disagreement(result.availability, len(self.plan))
        return result

    def _judge_damaged(self, checkpoints: Path) -> list[str]:
        """A damaged checkpoint that no launch set aside is wrong in its own fault. Returns: what else is wrong."""
        aside = {path.stat().st_ino: path.name for path in checkpoints.glob("damaged-*")}
        for inode, (outcome, name) in self.damaged.items():
            if inode not in aside:
                outcome.wrong = outcome.wrong or f"a bit of {name} was flipped, and no launch set it aside"
        return [f"{name} has no flipped bit" for inode, name in aside.items() if inode not in self.damaged]

    def _launch(self, faults: list[Fault]) -> Ended:
        return launch(self.scene, DRILLED, faults, is_cold=self.is_cold, hang_seconds=self.hang_seconds)

    def _judge(self, outcome: Outcome, ended: Ended, own: random.Random) -> float:
        """Fills the outcome of the fault that ended a launch; damages files, where it says so, and sees that it is
        found. Returns: when no rank was left."""
        fault, kind = outcome.fault, KINDS[outcome.fault.kind]
        if fault.number not in ended.came:
            raise LaunchError(
                f"A launch ended with status {ended.status} before fault {fault.number} ({fault.kind}) came.",
                f"This is what the drill is for. The end of its log: {ended.log[-3000:]}",
            )
        outcome.came_at = ended.came[fault.number]
        outcome.status, outcome.detect_seconds = ended.status, ended.at - outcome.came_at
        at = self._data_bit(outcome, ended, own) if fault.kind == "data_bit" else ended.at
        if outcome.status not in kind.statuses:
            outcome.wrong = f"ended with {outcome.status}, not {' or '.join(map(str, kind.statuses))}"
        if fault.kind == "gradient_bit" and f" not what they were: rank {fault.rank} (" not in ended.log:
            outcome.wrong = outcome.wrong or f"rank {fault.rank} is not named"
        if fault.kind == "checkpoint_bit":
            newest = self.scene.newest_checkpoint(DRILLED)
            flip_a_bit(newest / f"rank-{fault.rank:05d}.safetensors", own)
            self.damaged[newest.stat().st_ino] = outcome, newest.name
        return at

    def _data_bit(self, outcome: Outcome, killed: Ended, own: random.Random) -> float:
        shard = self.scene.shard()
        whole = shard.read_bytes()
        flip_a_bit(shard, own)
        ended = self._launch([])
        shard.write_bytes(whole)
        assert outcome.detect_seconds is not None
        outcome.detect_seconds += ended.at - killed.at
        outcome.status = ended.status
        if shard.name not in ended.log:
            outcome.wrong = f"{shard.name} is not named by the launch on it"
        return ended.at


def _line(outcome: Outcome) -> str:
    fault = outcome.fault
    found = f"{outcome.detect_seconds:.1f} s" if outcome.detect_seconds is not None else "-"
    what = outcome.wrong or "as it should"
    where = f"fault {fault.number}: {fault.kind} at {fault.moment}, rank {fault.rank}"
    return f"{where}: status {outcome.status} after {found}: {what}"
