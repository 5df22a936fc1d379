"""A plan's step, without memory: what several tests time."""

from copy import deepcopy
from enum import Enum
from functools import cache, reduce

import yaml

from gpt4moe.config.load import load_plan_config
from gpt4moe.config.plan import PlanConfig
from gpt4moe.planner.efficiency import planning_profile
from gpt4moe.planner.step_time import StepTime, step_time
from gpt4moe.planner.work import Work, timed_kinds


@cache
def _composed(*groups: str) -> PlanConfig:
    return load_plan_config(list(groups))


def plan_of(*overrides: str) -> PlanConfig:
    """As load_plan_config: groups are composed once (Hydra takes 0.3 s), single keys are set on a copy."""
    plan = deepcopy(_composed(*(override for override in overrides if "." not in override.split("=")[0])))
    for override in overrides:
        key, value = override.split("=", 1)
        *parents, last = key.split(".")
        if parents:
            owner = reduce(getattr, parents, plan)
            kept = getattr(owner, last)
            new = yaml.safe_load(value)
            setattr(owner, last, type(kept)(new) if isinstance(kept, float | Enum) else new)
    plan.validate()
    return plan


def work_of(plan: PlanConfig) -> Work:
    return Work(
        model=plan.model,
        kinds=timed_kinds(plan.model),
        parallel=plan.parallel,
        micro_batch_size=plan.training.micro_batch_size,
        cluster=plan.cluster,
        efficiency=planning_profile(plan.cluster.generation),
        matrix_peak=plan.cluster.peak_flops(plan.precision.dtype),
        imbalance=plan.imbalance if plan.parallel.ep > 1 else 1.0,
    )


def step_of(plan: PlanConfig, world: int) -> StepTime:
    return step_time(work_of(plan), plan.training, world)
