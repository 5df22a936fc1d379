"""python -m gpt4moe.train: one rank of a training run, and the guided tour of the house.

load    overrides -> RunConfig                                         training.launch, config.load
check   may it start? layout, data, identity, restarts; no torch       training.launch, parallel.legality, data.check
probes  what the model is asked between steps                          evaluation.in_loop
world   torch.distributed, this rank's process groups, its watchdog    parallel.groups, training.watchdog
build   data, model, engine, callbacks; resumed from a checkpoint      training.build, training.resume
fit     steps until the end; going back and on                         training.loop, training.update
"""

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

# Huge pages for tensors on CPUs: page faults of a tiny step fall from 87k to 5k, 7% of its time. torch reads it once.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# A lost rank is told in one line (training.watchdog); torch would add a C++ stack on each of the others.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from gpt4moe.resilience.signals import SignalNotes, end_status

signals = SignalNotes()
if __name__ == "__main__":  # before the seconds that the other imports take: a signal meanwhile would kill this rank
    signals.listen()

from gpt4moe.errors import GoBack, Gpt4MoeError, RankEnded
from gpt4moe.evaluation.in_loop import read_probes
from gpt4moe.parallel.environment import Environment, set_cuda_variables
from gpt4moe.parallel.layout import Layout
from gpt4moe.runlog.command_line import outlive_output
from gpt4moe.training.launch import HELP, Launch, check, load, report, set_up_logging

if TYPE_CHECKING:  # torch takes seconds
    from gpt4moe.training.callbacks.probes import Probe


def main(arguments: list[str]) -> int:
    """Returns the exit status. Under a launcher every rank returns the same one, and rank 0 alone prints."""
    if any(argument in ("-h", "--help") for argument in arguments):
        sys.stdout.write(HELP)
        return 0
    outlive_output()
    set_cuda_variables()
    environment, have_met = None, False
    try:
        environment = Environment.detect()
        run = load(arguments, environment.job)
        launch, probes = check(run, environment), read_probes(run)
        have_met = True
        return train(launch, environment, probes)
    except RankEnded as ended:  # told, by the rank that it happened to
        return ended.exit_code
    except Gpt4MoeError as error:
        return report(error, environment, have_met=have_met)


def train(launch: Launch, environment: Environment, probes: "Sequence[Probe]") -> int:
    """Trains on this rank. Returns: the exit status. Raises: Gpt4MoeError, the same on every rank."""
    set_up_logging(environment)
    run = launch.run
    from gpt4moe.parallel.groups import ProcessGroups, world  # torch, which takes seconds: only here
    from gpt4moe.resilience.hangs import Limits
    from gpt4moe.training.watchdog import Watchdog

    timeout = timedelta(minutes=run.resilience.collective_timeout_minutes)
    with (
        world(
            environment,
            timeout=timeout,
            patience_seconds=run.resilience.meeting_seconds,
            deterministic=run.training.deterministic,
        ) as device,  # fmt: skip
        Watchdog(environment, Limits.of(run.resilience), launch.folder.path, device.type) as watchdog,
    ):
        from gpt4moe.pages.run_report import write_run_report
        from gpt4moe.training.build import build_trainer
        from gpt4moe.training.fallback import step_back
        from gpt4moe.training.resume import latest_step

        layout = Layout.from_config(run.parallel, environment.world_size)
        groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed, timeout=timeout)
        watchdog.thread.knows(groups.by_name)
        latest = latest_step(launch.folder, groups)
        if latest >= run.training.steps:
            if groups.is_first_rank:
                sys.stdout.write(f"{launch.folder.path} has its {run.training.steps} steps: nothing to do.\n")
            return 0
        trainer = before = None
        while True:
            try:
                trainer = build_trainer(
                    launch, groups, latest, signals, write_run_report, probes, before, watchdog=watchdog
                )
            except Gpt4MoeError as error:
                if not step_back(error, launch.folder, latest, groups):
                    raise
            else:
                before = trainer.context
                try:
                    trainer.fit()
                    goes_back = False
                except GoBack:
                    goes_back = True
                if before.stop_requested:  # also where the save that the signal asked for led to going back
                    return end_status(before.stop_requested)
                if not goes_back:
                    return 0
            latest = latest_step(launch.folder, groups)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
