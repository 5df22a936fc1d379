"""Rehearse a training step of one GPU without a GPU: what it would refuse, where the host waits, what bounds its speed.

It builds one rank of any layout in this process, on fake tensors of cuda:0 (shapes and no values) and a fake process
group, and takes two training steps with the trainer's own code. Then it prints
  - operations that mix CPU and GPU tensors, and kernels that refuse their input, with file and line;
  - the kernel of every attention call, and the bytes of its scores where it is not flash attention;
  - host syncs of a step, by file and line; kernels of a layer and micro-batch; collectives;
  - bytes and FLOPs of the parts of the step, and from them the MFU ceiling, with what it assumes.
Nothing is measured: no figure is the time of a GPU. It needs g++ (once, some seconds) and the CPU build of torch.

examples:
  python tools/rehearse_gpu.py +experiment=mixtral_slice
  python tools/rehearse_gpu.py +experiment=tiny parallel.tp=2 parallel.ep=2 precision=bf16 output=json
  python tools/rehearse_gpu.py +experiment=gpt4 rank=1664          # the second pipeline stage of 24,960 ranks

arguments:
  key=value, group=choice   as for python -m gpt4moe.train (configs/ has the groups); cluster=cpu becomes h200_141g
  ranks=N                   the world; default: cluster.devices, or the fewest that hold the layout
  rank=N                    which rank is built; default 0
  output=json, --json       JSON alone on stdout

exit status: 0 nothing was refused; 1 something was; 2 bad input, or no C++ compiler.
"""

import sys
from pathlib import Path

# Run as a script from a checkout: the package lies beside tools/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt4moe.gpu_rehearsal import command
from gpt4moe.runlog.command_line import run_tool


def main(arguments: list[str]) -> int:
    return run_tool(arguments, __doc__, lambda asked: command.run(command.read(asked)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
