"""python -m gpt4moe.train: one rank of a training run, and the guided tour of the house.

overrides --config.load--> RunConfig --parallel.legality, data.check--> a run that may start
environment --parallel.groups--> live groups --training.build--> Trainer --fit--> run folder
"""

import logging
import os
import sys
import warnings
from pathlib import Path

# Huge pages for tensors on CPUs: page faults of a tiny step fall from 87k to 5k, 7% of its time. torch reads it once.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from gpt4moe.resilience.signals import REQUEUE, SignalNotes

signals = SignalNotes()
if __name__ == "__main__":  # before the seconds that the other imports take: a signal meanwhile would kill this rank
    signals.listen()

from gpt4moe.config.load import config_from_dict, load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.data.check import check_data, data_identity
from gpt4moe.errors import Gpt4MoeError
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import require_legal
from gpt4moe.runlog.command_line import print_error

HELP = """\
Train a GPT-4-shaped mixture of experts.

  python -m gpt4moe.train +experiment=tiny run.name=first
  torchrun --nproc-per-node 4 -m gpt4moe.train +experiment=tiny parallel=tp2_pp2_ep2 run.name=second
  sbatch --nodes=2 --ntasks-per-node=2 slurm/train.sh +experiment=tiny parallel=tp2_pp2_ep2 run.name=third

Arguments are Hydra overrides: key=value (parallel.tp=2, training.steps=20) or group=choice (data=mock, precision=bf16).
The groups are the folders of configs/; every key of a run, with its value, is in <run folder>/resolved.yaml.
The same command again goes on from the latest checkpoint of the run folder, runs/<run.name>.

USR1 saves now and goes on; TERM or USR2 saves and ends; before training begins there is nothing to save.

Exit status: 0 done; 1 the loss or gradient was not finite; 2 bad input; 85 saved after a signal, please requeue.
"""


def main(arguments: list[str]) -> int:
    """Returns the exit status. Under a launcher every rank returns the same one, and the first alone prints."""
    if any(argument in ("-h", "--help") for argument in arguments):
        sys.stdout.write(HELP)
        return 0
    environment, have_met = None, False
    try:
        environment = Environment.detect()
        run = _checked(arguments, environment)
        have_met = True
        return _train(run, environment)
    except Gpt4MoeError as error:
        is_first = environment is None or environment.rank == 0
        if is_first:
            print_error(error.cause, error.cure)
        if environment is not None:
            environment.refuse_together(error.exit_code)
            if not is_first and not have_met and environment.first_rank_waits():
                print_error(error.cause, error.cure)  # this rank alone refused: its node lacks the data, for example
        return error.exit_code


def _checked(arguments: list[str], environment: Environment) -> RunConfig:
    """A run that may start, as far as one rank can tell without torch. Raises: Gpt4MoeError."""
    from gpt4moe.checkpoint.retention import committed_steps, find_checkpoint
    from gpt4moe.resilience.restarts import refuse_endless_restarts
    from gpt4moe.runlog.dashboard import read_dashboard
    from gpt4moe.training.run_folder import RunFolder

    run = _load(arguments)
    require_legal(run.model, run.parallel, run.training, environment.world_size)
    check_data(run)
    read_dashboard(run.tracking.dashboard)
    folder = RunFolder.of(run)
    folder.check_identity(run, data_identity(run))
    saved = max(committed_steps(folder.checkpoints), default=0)
    if not saved and run.checkpoint.load is not None:
        find_checkpoint(Path(run.checkpoint.load))
    if saved < run.training.steps:
        began = [start["first_step"] for start in folder.starts()]
        # With nothing saved, the run begins where its last start did: checkpoint.load may be at any step.
        next_step = saved + 1 if saved or not began else began[-1]
        refuse_endless_restarts(_restarts(), began, next_step, run.resilience)
    return run


def _restarts() -> int:
    """How many starts of this run Slurm has made by itself: requeues of this job, jobs before it in a chain."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) + int(os.environ.get("GPT4MOE_CHAIN_LINK", "0"))


def _load(arguments: list[str]) -> RunConfig:
    """The run of these overrides; for a job that has trained before and was put back into the queue, the config of its
    last start. A chain is one job in this."""
    from gpt4moe.training.run_folder import RunFolder

    run = load_run_config(arguments)
    own_jobs = [os.environ.get("SLURM_JOB_ID"), *os.environ.get("GPT4MOE_CHAIN_JOBS", "").split()]
    frozen = RunFolder.of(run).last_config(own_jobs) if _restarts() > 0 else None
    return run if frozen is None else config_from_dict(frozen)


def _train(run: RunConfig, environment: Environment) -> int:
    from gpt4moe.checkpoint.retention import committed_steps
    from gpt4moe.training.run_folder import RunFolder

    folder = RunFolder.of(run)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("gpt4moe").setLevel(logging.INFO if environment.rank == 0 else logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(megatron|torch|deepspeed)\b")

    from gpt4moe.parallel.groups import ProcessGroups, world

    with world(environment) as device:
        from gpt4moe.pages.run_report import write_run_report
        from gpt4moe.parallel.agreement import broadcast_int
        from gpt4moe.training.build import build_trainer

        layout = Layout.from_config(run.parallel, environment.world_size)
        groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed)
        # The first rank looks: file systems may show another rank an older listing.
        latest = broadcast_int(max(committed_steps(folder.checkpoints), default=0), groups)
        if latest >= run.training.steps:
            if groups.is_first_rank:
                sys.stdout.write(f"{folder.path} has its {run.training.steps} steps: nothing to do.\n")
            return 0
        trainer = build_trainer(run, groups, latest, signals, write_run_report)
        trainer.fit()
        return REQUEUE if trainer.context.stop_requested else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
