"""python -m tests.fuzz: malformed input for every command, from a seed; a table of how each kind was met.

  python -m tests.fuzz --seed 1 --cases 1200
  python -m tests.fuzz --seed 1 --kinds "checkpoint,run folder"

Exit status: 0 no fault; 1 a traceback, a hang, another status, lines without a cause and a cure, or something written.
"""

import argparse
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.cases import ALL, KINDS, TRAIN, Case, cases, command
from tests.fuzz.damage import MARKER, Damage
from tests.fuzz.forked import FOUND, REFUSED, TAKEN, Ended, copied, run_forked, verdict
from tests.fuzz.worlds import make_world


@dataclass
class Tally:
    """How the cases of all kinds ended."""

    count: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: dict[str, list[str]] = field(default_factory=dict)
    """Faults that are alike -> each."""

    def add(self, case: Case, ended: Ended) -> None:
        how, why = verdict(ended, case.statuses)
        if how == TAKEN and case.tool == TRAIN and ended.wrote:
            how, why = "fault", f"checked, and wrote {ended.wrote[:5]}"
        self.count[case.kind, how] += 1
        if how == "fault":
            self.faults.setdefault(f"{case.kind}: {re.sub(r'[0-9]+', 'N', why)}", []).append(
                f"{why}\n    {case.describe()[:1500]}"
            )

    def table(self) -> list[str]:
        columns = (REFUSED, FOUND, TAKEN, "fault")
        lines = [
            "| kind | cases | refused in two lines | damage reported | taken | faults |",
            "|---|---|---|---|---|---|",
        ]
        kinds = [kind for kind in ALL if any(self.count[kind, how] for how in columns)]
        for kind in kinds:
            numbers = [self.count[kind, how] for how in columns]
            lines.append(f"| {kind} | {sum(numbers)} | {' | '.join(map(str, numbers))} |")
        totals = [sum(self.count[kind, how] for kind in kinds) for how in columns]
        return [*lines, f"| all | {sum(totals)} | {' | '.join(map(str, totals))} |"]


def try_case(case: Case, world: Path) -> Ended:
    """One case in a folder of its own, which is removed again."""
    main = command(case.tool)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        copied(world, case.needs, folder)
        for damage in case.damages:
            damage.apply(folder)
        return run_forked(lambda: main(list(case.arguments)), folder)


def fuzz(world: Path, number: int, count: int, kinds: Sequence[str] = ALL) -> Tally:
    """`count` cases, as many of each kind."""
    tally = Tally()
    for kind in kinds:

        @seed(number)
        @settings(
            max_examples=max(1, count // len(kinds)),
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(cases(kind, world))
        def run(case: Case) -> None:
            tally.add(case, try_case(case, world))

        run()
        sys.stderr.write(f"{kind}: done\n")
    return tally


def poisoned(world: Path, kind: str, *, is_every: bool) -> list[str]:
    """A pickle in the place of a file of each ending, and what went wrong: it ran, or a fault.

    Args:
        is_every: each ending before each command of the kind; else each of both once.
    """
    row = KINDS[kind]
    files = sorted(path.relative_to(world).as_posix() for path in world.glob(row.files) if path.is_file())
    names = list({Path(name).suffix: name for name in files}.values())
    pairs = [(command, name) for command in row.commands for name in names]
    if not is_every:
        most = max(len(names), len(row.commands))
        pairs = [(row.commands[n % len(row.commands)], names[n % len(names)]) for n in range(most)]
    wrong = []
    for words, name in pairs:
        case = Case(kind, words[0], words[1:], row.needs, row.statuses, (Damage(name, "pickle"),))
        ended = try_case(case, world)
        how, why = verdict(ended, (0, 1, 2))
        if MARKER in ended.wrote or how == "fault":
            wrong.append(f"{'unpickled' if MARKER in ended.wrote else why}\n    {case.describe()}")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=1200)
    parser.add_argument("--kinds", default=",".join(ALL))
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fuzz-world-") as name:
        world, kinds = make_world(Path(name)), asked.kinds.split(",")
        tally = fuzz(world, asked.seed, asked.cases, kinds)
        wrong = [one for kind in kinds if kind in KINDS for one in poisoned(world, kind, is_every=True)]
    for one in wrong:
        sys.stdout.write(f"PICKLE {one}\n")
    for alike, faults in tally.faults.items():
        sys.stdout.write(f"FAULT x {len(faults)}: {alike.partition(':')[0]}: {faults[0]}\n")
    sys.stdout.write("\n".join([f"seed {asked.seed}", *tally.table()]) + "\n")
    return int(bool(tally.faults or wrong))


if __name__ == "__main__":
    sys.exit(main())
