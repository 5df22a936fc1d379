"""Rehearse a run of any size without its devices: build what its ranks would build, check it, write its files.

It builds the first rank of every pipeline stage, and of every kind of stage (first, last, and those between by their
layers) the first and last rank of each axis (tp, cp, dp, ep, etp, copies of experts) and the one with most memory: real
modules, gradient buffers and optimizers on the meta device. Then it checks
  - every process group of these ranks against the layout;
  - parameter, gradient and optimizer bytes, read off the built objects, against the planner's, to the byte;
  - that the checkpoint files of all ranks of the world hold every tensor and its moments exactly once
    (the ranges come from the cut of the built buffers, which is compared with the optimizer of each rank built);
  - that the inference files cut from that checkpoint hold every tensor, and that of the ranks that load them (the
    loader's own reading, without the data) each reads all of its own file and nothing else.
Files have true headers, sizes, hashes and a manifest, and holes for data: they read as zeros and take almost no disk.

examples:
  python tools/rehearse.py +experiment=gpt4                      # 24,960 ranks, a few minutes on 2 cores
  python tools/rehearse.py +experiment=tiny parallel.tp=2 parallel.pp=2 parallel.ep=4 ranks=8 inference=2x2 --json

arguments:
  key=value, group=choice   as for python -m gpt4moe.train (configs/ has the groups)
  ranks=N                   the world; default: cluster.devices, or the fewest that hold the layout
  inference=TPxPP           the serving ranks; default 8x16, as reported of GPT-4
  out=FOLDER                keeps the files there: new, or empty; default: a temporary folder, removed at the end
  output=json, --json       JSON alone on stdout; progress stays on stderr

exit status: 0 everything fits together; 1 something does not; 2 bad input: the trainer itself would refuse this run.
"""

import sys
from pathlib import Path

# Run as a script from a checkout: the package lies beside tools/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt4moe.rehearsal import command
from gpt4moe.runlog.command_line import run_tool


def main(arguments: list[str]) -> int:
    return run_tool(arguments, __doc__, lambda asked: command.run(command.read(asked)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
