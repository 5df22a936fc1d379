"""Plants faults in a small run and shows what each cost: make drill FAULTS=60 SEED=1.

  python -m gpt4moe.drill.command --faults 60 --write docs/drill.md
  python -m gpt4moe.drill.command --faults 10 --cold        # every rank a process of its own, as people start them

Exit status: 0 all survived; 1 a fault was not or did not come, the run is not equal to one without faults, or (from 30
faults on) availability by its two ways is more than 3 points apart; 2 bad input; 130 Ctrl-C.
"""

import argparse
import json
import sys
from pathlib import Path

from gpt4moe.drill.drill import Drill
from gpt4moe.drill.kinds import draw, last_step
from gpt4moe.drill.page import plan_keys, summary, write_block
from gpt4moe.drill.scene import EVERY, RESULT, Scene
from gpt4moe.errors import INTERRUPTED, ConfigError, Gpt4MoeError
from gpt4moe.runlog.command_line import print_error


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gpt4moe.drill.command",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1, help="of the plan: which faults come when")
    parser.add_argument("--ranks", type=int, default=2, help="2 or 4")
    parser.add_argument("--folder", type=Path, default=Path("runs/drill"), help="empty, or an earlier drill's")
    parser.add_argument("--cold", action="store_true", help="start each rank as a process of its own")
    parser.add_argument(
        "--hang-seconds", type=float, default=120.0, help="no step for so long, and no watchdog: killed"
    )
    parser.add_argument("--watchdog-seconds", type=float, default=8.0, help="resilience.hang_seconds of the run")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the result into this page, docs/drill.md")
    given = parser.parse_args(arguments)
    try:
        return run(given)
    except Gpt4MoeError as error:
        print_error(error.cause, error.cure)
        return error.exit_code
    except KeyboardInterrupt:
        print_error("Stopped by Ctrl-C.", "The same command begins again.")
        return INTERRUPTED


def run(given: argparse.Namespace) -> int:
    """Drills as `given` says, prints the result and writes it. Raises: Gpt4MoeError."""
    if given.faults < 1 or given.ranks not in (2, 4):
        raise ConfigError("--faults is below 1, or --ranks not 2 or 4.", "See --help.")
    if not 0 < given.watchdog_seconds < given.hang_seconds:
        raise ConfigError(
            "--watchdog-seconds is not above 0, or not below --hang-seconds: the watchdog must come first.",
            "See --help.",
        )
    plan = draw(given.seed, given.faults, ranks=given.ranks, every=EVERY)
    scene = Scene(
        folder=given.folder.resolve(), ranks=given.ranks, steps=last_step(plan, EVERY),
        watchdog_seconds=given.watchdog_seconds,
    )  # fmt: skip
    result = Drill(
        scene=scene, plan=plan, seed=given.seed, is_cold=given.cold, hang_seconds=given.hang_seconds, say=_say
    ).run()
    (given.folder / RESULT).write_text(json.dumps(result.to_json(), indent=1))
    text = summary(result)
    _say(f"\n{text}")
    if result.availability is not None:
        _say(f"\nAs keys of a plan, of this model and machine: {plan_keys(result.availability)}")
    if given.write is not None:
        write_block(given.write, text)
    return 0 if result.is_good else 1


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
