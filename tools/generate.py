"""Generates text from a checkpoint or a Hugging Face folder, on any layout, with a cache of keys and values.

examples:
  python tools/generate.py runs/first --prompt "def main(" "The " --tokens 60
  python tools/generate.py runs/first/checkpoints/step-00000100 --temperature 0 --json
  python tools/generate.py exported --chat --prompt "Who are you?"
  python tools/generate.py runs/first --input prompts.jsonl --output answers.jsonl --num-samples 4
  python tools/generate.py runs/seeing --image a.png clip/ --prompt "A still <image> and a clip <image>"
  torchrun --nproc-per-node=4 tools/generate.py runs/first --tp 2 --pp 2 --ep 2 --prompt "The "

The same prompt and seed give the same text on every layout, alone or among others. A Hugging Face folder and one made
by to-inference are converted in memory: our model runs them.
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
        from gpt4moe.convert.verify import open_weights
        from gpt4moe.inference import command

        command.run(command.parser(__doc__ or "").parse_args(arguments), environment, open_weights)

    return run_tool(work)


if __name__ == "__main__":
    sys.exit(main())
