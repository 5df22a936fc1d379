"""Searches for better texts: candidates drawn in turn, each seeing the task and the best so far; scored; the best kept.

examples:
  python tools/refine.py runs/first --input tasks.jsonl --output found --rounds 16
  python tools/refine.py runs/first --input tasks.jsonl --output checked --scorer mychecks:is_right
  python tools/refine.py runs/first --input tasks.jsonl --output scored --scorer "python score.py" --scorer-seconds 5
  python tools/refine.py runs/first --input tasks.jsonl --output votes --method self-consistency
  torchrun --nproc-per-node=4 tools/refine.py runs/first --tp 2 --pp 2 --input tasks.jsonl --output ranks

--method best-of-n and self-consistency (the majority) draw as many candidates from the task alone, to compare. The
output folder gets trace.jsonl, best.jsonl and rounds.html; the same command goes on after a kill. Other
settings are refused there, so each of the commands above has a folder of its own.
exit status: 0 done; 2 bad input.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

# Run as a script from a checkout: the package lies beside tools/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt4moe.parallel.environment import Environment
from gpt4moe.training.launch import run_tool


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status, under a launcher the same on every rank; rank 0 alone prints."""

    def work(environment: Environment) -> None:
        from gpt4moe.refinement import command

        command.run(command.parser(__doc__ or "").parse_args(arguments), environment)

    return run_tool(work)


if __name__ == "__main__":
    status = main()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # closed, or never there: main has said so
            stream.flush()
    # All is on the disk. Python's own end would wait for the threads of several libraries, which now and then hung.
    os._exit(status)
