"""Where a difference of two passes began, by messages over any group, not the pipeline's alone."""

import torch
from torch import distributed

from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.handed import Handed, began_here
from gpt4moe.parallel.layout import Layout
from tests.spawn import run_ranks


def _began(environment: Environment) -> list[str | None]:
    """Rank 0 sends another message in the second pass, and rank 1 sends on what it got: over cp, over the world."""
    found = []
    with world(environment) as device:
        groups = ProcessGroups.create(Layout.from_config(ParallelConfig(cp=2), 2), environment.rank, device, 1)
        for group in (groups.cp, None):
            passes = []
            for number in (1.0, 2.0):
                value = torch.tensor([number if groups.rank == 0 else 0.0])
                with Handed() as handed:
                    if groups.rank == 0:
                        distributed.send(value, 1, group=group)
                        distributed.recv(value, 1, group=group)
                    else:
                        distributed.recv(value, 0, group=group)
                        distributed.send(value, 0, group=group)
                passes.append(handed)
            found.append(began_here(passes[0], passes[1], True, groups))
    return found


def test_messages_of_any_group_of_a_layout_are_followed_and_of_others_nobody_is_named() -> None:
    (over_cp, over_world), (after_it, over_world_too) = run_ranks(2, _began)
    assert over_cp == "in what it gave to its collective 1 of 2 (send)" and after_it is None
    assert over_world is over_world_too is None
