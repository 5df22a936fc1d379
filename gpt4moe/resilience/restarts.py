"""Limits on automatic restarts. Without limits, a run that crashes at the same step would be restarted for ever.

train.sh: 85, 86, or a rank killed --requeue--> SlurmJob.restarts + 1 --refuse_endless_restarts--> a launch, or status 2
"""

from gpt4moe.config.resilience import ResilienceConfig
from gpt4moe.errors import LaunchError


def refuse_endless_restarts(restarts: int, first_steps: list[int], next_step: int, limits: ResilienceConfig) -> None:
    """Raises LaunchError when an automatic restart would be one too many.

    Args:
        restarts: how often Slurm has restarted this job (SlurmJob.restarts). 0: a launch by hand, never refused.
        first_steps: first step of each launch so far, in order.
        next_step: first step of this launch.
    """
    if restarts == 0:
        return
    if restarts > limits.max_restarts:
        raise LaunchError(
            f"This job was restarted {restarts} times, more than resilience.max_restarts={limits.max_restarts}.",
            "Look at the logs; submit it again, or set resilience.max_restarts higher.",
        )
    stuck = 0
    while stuck < len(first_steps) and first_steps[-1 - stuck] == next_step:
        stuck += 1
    if stuck >= limits.max_stuck_starts:
        raise LaunchError(
            f"{stuck} starts in a row began at step {next_step} and saved nothing new: another restart would do no "
            "better.",
            "Look at the logs of these starts. A time limit too short for the first checkpoint: lower "
            "checkpoint.every. A crash at one step: mend its cause. Then submit the job again.",
        )
