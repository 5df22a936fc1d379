"""Is this cluster fit for this run? Every rank looks and measures on its own node, the first one judges and prints.

  python tools/preflight.py +experiment=gpt4 ranks=24960 time_limit=24:00:00    one process: what needs no other node
  torchrun --nproc-per-node 4 tools/preflight.py +experiment=tiny parallel=tp2_pp2_ep2
  sbatch --nodes=2 --ntasks-per-node=8 slurm/preflight.sh +experiment=tiny parallel=tp2_pp2_ep2

It checks that every rank came; versions, GPUs, memory and data equal on all; the layout legal, placed with tp within a
node, and planned to fit; the run's root shared, with room and speed for checkpoints; the first checkpoint before the
time limit; and it times products of every rank, messages of every kind of group, and links of every node, against the
cluster's figures (configs/cluster) and against each other: the slow one is named. What was not checked says why.

arguments:
  key=value, group=choice   as for python -m gpt4moe.train (configs/ has the groups)
  ranks=N                   the run's ranks, asked of one process; default: those that were started
  time_limit=24:00:00       the training job's, as sbatch --time has it; slurm/preflight.sh gives its own job's
  signal=B:USR1@300         the training job's --signal; default: slurm/train.sh's, 120 s before the time limit;
                            slurm/preflight.sh gives SBATCH_SIGNAL of slurm/cluster.env where that is set
  output=json, --json       JSON alone on stdout; progress stays on stderr

exit status: 0 fit, maybe with warnings; 1 a check failed; 2 bad input.
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
