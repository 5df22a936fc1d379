"""Serves a checkpoint or a Hugging Face folder to OpenAI's clients, for trying a model on its training layout.

examples:
  python tools/serve.py runs/first
  python tools/serve.py exported --port 8001 --name mine
  torchrun --nproc-per-node=4 tools/serve.py runs/first --tp 2 --pp 2 --ep 2

It has /v1/models, /v1/completions and /v1/chat/completions, on this machine alone unless --host says otherwise. Rank 0
serves, the other ranks follow. Ctrl-C ends it. exit status: 0 ended by a signal; 2 bad input, or a rank has died.
"""

import sys
from pathlib import Path

# Run as a script from a checkout: the package lies beside tools/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt4moe.parallel.environment import Environment
from gpt4moe.training.launch import run_tool


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status, under a launcher the same on every rank; rank 0 alone prints."""

    def work(environment: Environment) -> None:
        from gpt4moe.serving import command

        command.run(command.parser(__doc__ or "").parse_args(arguments), environment)

    return run_tool(work)


if __name__ == "__main__":
    sys.exit(main())
