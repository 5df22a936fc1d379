"""A launch of a run on one rank, up to the moment when the ranks meet. Without torch, so that bad input costs no wait.

load     overrides -> RunConfig; a job that Slurm requeued uses the config of its last launch instead
check    can this run be launched here? Everything that one rank can check by itself
report   an error of either -> one rank prints two lines, all ranks have the same exit status
"""

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpt4moe.architecture.encoder_folder import require_encoder
from gpt4moe.architecture.trained import require_images, tensor_settings, trained_names
from gpt4moe.checkpoint.retention import find_checkpoint, latest_saved
from gpt4moe.config.load import config_from_dict, load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.data.check import CheckedData, check_data
from gpt4moe.errors import ConfigError, Gpt4MoeError
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.kernel_problems import kernel_problems, missing_packages
from gpt4moe.parallel.legality import refuse, require_legal
from gpt4moe.parallel.slurm_job import SlurmJob
from gpt4moe.resilience.restarts import refuse_endless_restarts
from gpt4moe.runlog.command_line import print_error
from gpt4moe.runlog.dashboard import read_dashboard
from gpt4moe.training.run_folder import RunFolder

HELP = """\
Train a GPT-4-shaped mixture of experts.

  python -m gpt4moe.train +experiment=tiny run.name=first
  python -m gpt4moe.launch_ranks --nproc-per-node 4 -m gpt4moe.train +experiment=tiny parallel=tp2_pp2_ep2 run.name=b
  sbatch --nodes=2 --ntasks-per-node=2 slurm/train.sh +experiment=tiny parallel=tp2_pp2_ep2 run.name=third

Arguments are Hydra overrides: key=value (parallel.tp=2, training.steps=20) or group=choice (data=mock, precision=bf16).
The groups are the folders of configs/; every key of a run, with its value, is in <run folder>/resolved.yaml.
The same command again resumes from the latest checkpoint of the run folder, runs/<run.name>.

USR1 saves now and goes on; Ctrl-C, HUP, TERM or USR2 saves and ends, a second Ctrl-C ends at once; before training
begins there is nothing to save.

Exit status: 0 done; 1 a check failed (loss or gradient not finite, replicas differ, a flipped bit), or any other error
of a rank; 2 bad input, or a disk that takes no more; 85 saved after a signal, 86 ranks hung or were lost, or a disk
stood still in a save: please requeue; 130 Ctrl-C; 128 + n signal n killed a rank. torchrun's own status is 1 in all
cases but the first.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One launch of a run, checked: what is known before torch is imported."""

    run: RunConfig
    folder: RunFolder
    data: CheckedData
    job: SlurmJob


def load(arguments: list[str], job: SlurmJob) -> RunConfig:
    """The run of these overrides. If Slurm requeued the job and it has trained: the config of the job's last launch.

    A chain of jobs counts as one job. Raises: ConfigError.
    """
    run = load_run_config(arguments)
    folder = RunFolder.of(run)
    if not folder.is_made:
        run.run.require_plain_name()
    frozen = folder.last_config(job.own_jobs) if job.restarts > 0 else None
    return run if frozen is None else config_from_dict(frozen)


def check(run: RunConfig, environment: Environment) -> Launch:
    """Layout, kernels, what is trained, data, dashboard, identity, checkpoint.load, restarts: in that order.

    Raises: Gpt4MoeError with the first thing that is wrong.
    """
    folder = RunFolder.of(run)
    saved = latest_saved(folder.path)
    require_legal(run.model, run.parallel, run.training.after(saved), environment.world_size)
    refuse([*kernel_problems(run, None), *missing_packages(run, None)])
    if run.model.vision is not None:
        require_encoder(run.model.vision.encoder)
    trained_names(run.model, run.stage)
    require_images(run.model, run.stage)
    tensor_settings(run.model, run.stage, run.optimizer)
    data = check_data(run, is_new=not folder.is_begun)
    read_dashboard(run.tracking.dashboard)
    folder.check_identity(run, data.identity)
    if not saved and run.stage.lora.rank and run.checkpoint.load is None:
        raise ConfigError(
            f"stage.lora.rank={run.stage.lora.rank} without checkpoint.load: adapters need the weights of a base.",
            "Set checkpoint.load to a step folder or a run folder.",
        )
    if not saved and run.checkpoint.load is not None:
        find_checkpoint(Path(run.checkpoint.load))
    if saved < run.training.steps:
        began = [start["first_step"] for start in folder.starts()]
        # Without a checkpoint the run begins at the step of its last launch: checkpoint.load may be of any step.
        next_step = saved + 1 if saved or not began else began[-1]
        refuse_endless_restarts(environment.job.restarts, began, next_step, run.resilience)
    return Launch(run=run, folder=folder, data=data, job=environment.job)


def report(error: Gpt4MoeError, environment: Environment | None, *, have_met: bool) -> int:
    """Prints an error that ends the launch, from one rank alone. Returns: the exit status, the same on every rank.

    Args:
        environment: None when the error is about the launcher's own variables.
        have_met: the ranks have met, so every rank has this error and rank 0 prints it. Before that, an error of this
            rank alone (its node lacks the data, for example) is printed here when rank 0 has none and waits.
    """
    is_first = environment is None or environment.rank == error.told_by
    if is_first:
        print_error(error.cause, error.cure)
    if environment is not None:
        environment.refuse_together(error.exit_code)
        if not is_first and not have_met and environment.first_rank_waits():
            print_error(error.cause, error.cure)
    return error.exit_code


def run_tool(work: Callable[[Environment], None]) -> int:
    """Runs a tool on the ranks of a launch. Returns: the exit status, the same on every rank.

    Args:
        work: imports what it needs, torch too, only when it is called.
    """
    warnings.filterwarnings("ignore")
    environment = None
    try:
        environment = Environment.detect()
        work(environment)
    except Gpt4MoeError as error:
        return report(error, environment, have_met=error.have_met)
    return 0


def set_up_logging(environment: Environment) -> None:
    """Rank 0 logs our messages to stdout; other ranks log only errors. Warnings of libraries are dropped."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("gpt4moe").setLevel(logging.INFO if environment.rank == 0 else logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(megatron|torch|deepspeed)\b")
