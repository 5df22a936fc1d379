"""Prove that a layout computes what one process computes, on this machine, without a GPU.

Takes the overrides of a training run and makes the run small. Starts the ranks of the layout here, runs the same small
model in one process, and compares the loss, the auxiliary losses, every gradient, the global norm, and the weights and
optimizer state after clipped steps. A mesh of up to 12 ranks stays whole; a larger one is proved on several smaller
ones, whose degrees divide its own. Layer pattern, router, losses, precision and engine stay as they are.

On a difference it names the first tensor that differs, how ranks cut it, which groups sum its gradient, and the likely
cause. It ends with what it did not prove. docs/proof.md explains the report.

examples:
  python tools/prove_layout.py +experiment=gpt4 parallel.tp=2 parallel.pp=2 parallel.ep=4 parallel.vpp=2
  python tools/prove_layout.py +experiment=tiny parallel.tp=2 parallel.ep=4 ranks=8 precision=bf16
  python tools/prove_layout.py +experiment=gpt4 ranks=24960 output=json      # two meshes of 12 ranks, stated

arguments:
  key=value, group=choice   as for python -m gpt4moe.train (configs/ has the groups)
  ranks=N                   the world to prove; default: the smallest legal one, with dp 2 where 12 ranks allow it
  output=json, --json       JSON alone on stdout; progress stays on stderr

exit status: 0 equal on every mesh (on_no_mesh lists what no mesh covers); 1 different, or a rank failed; 2 bad input:
the trainer itself would refuse this run; 3 not decided: round-off alone may explain what differs.
"""

import sys
from pathlib import Path

# Run as a script from a checkout: the package lies beside tools/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt4moe.proof import command
from gpt4moe.runlog.command_line import run_tool


def main(arguments: list[str]) -> int:
    return run_tool(arguments, __doc__, lambda asked: command.run(command.read(asked)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
