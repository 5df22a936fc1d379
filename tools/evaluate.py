"""Evaluates a checkpoint or a Hugging Face folder, on any layout: texts, questions, tasks of lm-evaluation-harness.

examples:
  python tools/evaluate.py runs/first --data data/demo
  python tools/evaluate.py runs/first --data texts.jsonl --json
  python tools/evaluate.py exported --choices choices.jsonl --exact exact.jsonl --output answers.jsonl
  torchrun --nproc-per-node=4 tools/evaluate.py runs/first --tp 2 --pp 2 --ep 2 --data data/demo
  python tools/evaluate.py runs/first --tasks arithmetic --include-path tasks

The numbers are the same on every layout.
exit status: 0 done; 2 bad input; 85 stopped by USR1, USR2 or TERM, and with --output the same command goes on.
"""

import sys
from pathlib import Path

# Run as a script from a checkout: the package lies beside tools/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt4moe.resilience.signals import end_on_signals

if __name__ == "__main__":  # before the seconds that other imports take
    end_on_signals()

from gpt4moe.parallel.environment import Environment
from gpt4moe.training.launch import run_tool


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status, under a launcher the same on every rank; rank 0 alone prints."""

    def work(environment: Environment) -> None:
        from gpt4moe.evaluation import command

        command.run(command.parser(__doc__ or "").parse_args(arguments), environment)

    return run_tool(work)


if __name__ == "__main__":
    sys.exit(main())
