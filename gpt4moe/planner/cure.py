"""What would make a layout legal, one change at a time: settings that were tried, so that they work as they stand.

an illegal plan -> other values of each key, nearest first --legality--> "gpus=960, parallel.tp=8 or ..."
"""

from collections.abc import Iterator
from copy import deepcopy

from gpt4moe.config.model import divisors
from gpt4moe.config.plan import PlanConfig
from gpt4moe.errors import LayoutError
from gpt4moe.parallel.layout import fewest_ranks
from gpt4moe.parallel.legality import layout_problems, refuse

FURTHEST = 64
"""Multiples on either side that are tried of a number without bounds."""


def require_legal(plan: PlanConfig, world: int) -> None:
    """Raises: LayoutError with all that is wrong, and changes that were tried and are legal where there are any."""
    problems = layout_problems(plan.model, plan.parallel, plan.training, world)
    if not problems:
        return
    changes = legal_changes(plan, world)
    if not changes:
        refuse(problems)
    causes = " ".join(problem.cause for problem in problems)
    raise LayoutError(causes, f"Set {'one of ' * (len(changes) > 1)}{', '.join(changes)}.")


def legal_changes(plan: PlanConfig, world: int) -> list[str]:
    """Overrides that each make the plan legal by itself, the nearest value of every key that has one."""
    found = []
    for key, values in _others(plan, world):
        now = world if key == "gpus" else _value(plan, key)
        for value in sorted(values, key=lambda value: (abs(value - now), value)):
            if value != now and value > 0 and _is_legal(plan, world, key, value):
                found.append(f"{key}={value}")
                break
    return found


def _others(plan: PlanConfig, world: int) -> Iterator[tuple[str, list[int]]]:
    model, parallel, training = plan.model, plan.parallel, plan.training
    yield "gpus", _multiples(fewest_ranks(parallel), world)
    yield "parallel.tp", divisors(model.num_attention_heads)
    yield "parallel.pp", list(range(1, model.num_layers + 1))
    yield "parallel.vpp", divisors(model.num_layers)
    yield "parallel.cp", [2**power for power in range(8)]
    yield "parallel.ep", divisors(model.moe.num_experts) if model.moe else [1]
    yield "parallel.etp", [1, 2, 4, 8]
    dp = max(1, world // (parallel.tp * parallel.pp * parallel.cp))
    group = dp * training.micro_batch_size * (parallel.pp if parallel.vpp > 1 else 1)
    yield "training.global_batch_size", _multiples(group, training.global_batch_size)
    yield "training.micro_batch_size", divisors(training.global_batch_size)


def _multiples(of: int, near: int) -> list[int]:
    middle = near // of
    return [of * count for count in range(max(1, middle - FURTHEST), middle + FURTHEST + 1)]


def _value(plan: PlanConfig, key: str) -> int:
    group, name = key.split(".")
    value: int = getattr(getattr(plan, group), name)
    return value


def _is_legal(plan: PlanConfig, world: int, key: str, value: int) -> bool:
    if key == "gpus":
        return not layout_problems(plan.model, plan.parallel, plan.training, value)
    tried = deepcopy(plan)
    group, name = key.split(".")
    setattr(getattr(tried, group), name, value)
    return not layout_problems(tried.model, tried.parallel, tried.training, world)
