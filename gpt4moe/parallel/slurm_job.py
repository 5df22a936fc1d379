"""SlurmJob: what Slurm and slurm/*.sh report about the job of a process. The only file that reads SLURM_* variables.

    SLURM_JOB_ID, SLURM_RESTART_COUNT                    the job, and how often it was requeued
    SLURM_STEP_ID, SLURM_PROCID, SLURM_STEP_NUM_TASKS    this process among the tasks of an srun
    GPT4MOE_CHAIN_LINK, GPT4MOE_CHAIN_JOBS               the jobs before it in a chain (slurm/train.sh --chain=N)

Environment.detect reads it once a launch; all other code gets it from the Environment. No torch.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmJob:
    """The job and the srun step of this process; the defaults are those of a process outside Slurm."""

    job_id: str | None = None
    step_id: str | None = None
    """Id of the srun step of this process; None in a batch shell, which no srun started."""
    task: str | None = None
    """SLURM_PROCID, unparsed: the rank, if this process belongs to a step."""
    num_tasks: str | None = None
    """SLURM_STEP_NUM_TASKS, unparsed: the world size."""
    local_task: str = "0"
    """SLURM_LOCALID, unparsed: the rank on its node."""
    num_nodes: str = "1"
    nodes: str = ""
    """Nodes of the step in Slurm's short form: node[1-4]."""
    restart_count: int = 0
    """Requeues of this job."""
    chain_link: int = 0
    """Jobs of its chain that came before this one."""
    chain_jobs: tuple[str, ...] = ()
    """Ids of those jobs."""

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> "SlurmJob":
        """From the variables of this process, or from others."""
        return cls(
            job_id=variables.get("SLURM_JOB_ID"),
            step_id=variables.get("SLURM_STEP_ID"),
            task=variables.get("SLURM_PROCID"),
            num_tasks=variables.get("SLURM_STEP_NUM_TASKS"),
            local_task=variables.get("SLURM_LOCALID", "0"),
            num_nodes=variables.get("SLURM_STEP_NUM_NODES", "1"),
            nodes=variables.get("SLURM_STEP_NODELIST", ""),
            restart_count=int(variables.get("SLURM_RESTART_COUNT", "0")),
            chain_link=int(variables.get("GPT4MOE_CHAIN_LINK", "0")),
            chain_jobs=tuple(variables.get("GPT4MOE_CHAIN_JOBS", "").split()),
        )

    @property
    def is_step(self) -> bool:
        """Whether srun started this process. Python in a batch shell has a job, but no step."""
        return self.step_id is not None and self.task is not None

    @property
    def number(self) -> int | None:
        """The job's id as a number; None outside a job."""
        return int(self.job_id) if self.job_id and self.job_id.isdecimal() else None

    @property
    def restarts(self) -> int:
        """Launches that Slurm made, not a person: requeues of this job, and earlier jobs of its chain."""
        return self.restart_count + self.chain_link

    @property
    def own_jobs(self) -> tuple[str | None, ...]:
        """Ids of this job and of those before it in its chain, which count as one job. Outside a job the id is None."""
        return (self.job_id, *self.chain_jobs)

    @property
    def rank_variables(self) -> dict[str, str | None]:
        """Rank, world size and rank on the node, under the names of their variables; for error texts too."""
        return {"SLURM_PROCID": self.task, "SLURM_STEP_NUM_TASKS": self.num_tasks, "SLURM_LOCALID": self.local_task}
