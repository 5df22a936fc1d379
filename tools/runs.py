"""Shows the runs of a folder: state, queue, step, loss, speed, ETA, restarts, goodput. Needs no GPU; only reads.

  python tools/runs.py                        every run in runs/, one line each
  python tools/runs.py runs/first /data/runs  run folders, and folders of run folders
  python tools/runs.py show first             where the time of one run went, by cause, and its launches
  python tools/runs.py show first --json      the same as JSON; times in seconds, dates in seconds since 1970

state     running, waiting (in the queue), finished, stopped (by a signal), failed (by an error), killed (without a stop
          event), damaged (its files cannot be read), unknown (on another node); for a running one also what it waits
          for, and in brackets the alerts of configs/dashboard.yaml that are on, such as no progress
job       the Slurm job of the last launch and its state; "not in a queue" for runs without Slurm
ETA       at the speed of the last launch, with its evaluations and checkpoints
goodput   time of the steps that count, as a share of wall time since the first submission; `show` has the rest
seen      time since the last step or event

exit status: 0 done; 2 bad input.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt4moe.errors import Gpt4MoeError
from gpt4moe.operations.run_state import named_run, run_folders
from gpt4moe.operations.run_status import statuses


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        usage="runs.py [FOLDER ...] [--json]\n       runs.py show RUN [--json]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("words", nargs="*", metavar="FOLDER", help="default: runs; or `show` and one run")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    given = parser.parse_args(arguments)
    is_one = given.words[:1] == ["show"]
    if is_one and len(given.words) != 2:
        parser.error("show wants one run, such as: runs.py show first")
    try:
        paths = [Path(word) for word in given.words or ["runs"]]
        runs = statuses([named_run(given.words[1])] if is_one else run_folders(paths))
    except Gpt4MoeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    if given.json:
        answers = [run.as_dict() for run in runs]
        sys.stdout.write(json.dumps(answers[0] if is_one else answers, indent=1) + "\n")
    else:
        from gpt4moe.operations.run_table import print_runs

        print_runs(runs, is_detailed=is_one)
    return 0


if __name__ == "__main__":
    sys.exit(main())
