"""Is this cluster fit for this run? Every rank collects facts and measures on its node; rank 0 judges and prints.

  python tools/preflight.py +experiment=gpt4 ranks=24960 time_limit=24:00:00    one process, no other node
  torchrun --nproc-per-node 4 tools/preflight.py +experiment=tiny parallel=tp2_pp2_ep2
  sbatch --nodes=2 --ntasks-per-node=8 slurm/preflight.sh +experiment=tiny parallel=tp2_pp2_ep2

Checks: every rank came; versions, GPUs, memory and data are the same on all; the layout is legal, has tp within a
node, and fits in memory as planned; run.root is shared, with space and speed for checkpoints; the first checkpoint
comes before the time limit. It times products of every rank, messages of every kind of group and links of every node,
compares them with the cluster's figures (configs/cluster) and with each other, and names the slow ones. A check that
was not made says why.

arguments:
  key=value, group=choice   as for python -m gpt4moe.train (configs/ has the groups)
  ranks=N                   the number of ranks of the run, for one process; default: the ranks that were started
  time_limit=24:00:00       of the training job, as for sbatch --time; slurm/preflight.sh gives its own job's
  signal=B:USR1@300         --signal of the training job; default: 120 s before the time limit, as slurm/train.sh;
                            slurm/preflight.sh gives SBATCH_SIGNAL of slurm/cluster.env where that is set
  output=json, --json       print JSON alone on stdout; progress is on stderr

exit status: 0 fit, perhaps with warnings; 1 a check failed; 2 bad input.
"""

import sys
from pathlib import Path

# Run as a script from a checkout: the package lies beside tools/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt4moe.errors import Gpt4MoeError
from gpt4moe.launch import command
from gpt4moe.parallel.environment import Environment
from gpt4moe.runlog.command_line import print_error


def main(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write((__doc__ or "").lstrip())
        return 0 if arguments else 2
    environment = None
    try:
        environment = Environment.detect()
        return command.run(command.read(arguments), environment)
    except Gpt4MoeError as error:
        if environment is None or environment.rank == 0:
            print_error(error.cause, error.cure)
        if environment is not None:
            environment.refuse_together(error.exit_code)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
