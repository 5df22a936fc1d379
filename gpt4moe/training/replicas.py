"""Checks that copies of a tensor on several ranks are bitwise equal. Names unequal ones and their ranks.

    whole weights, buffers            copies on every rank of a pipeline stage     tp, then dp x cp
    weights cut over tp               on the ranks that hold the same cut          dp x cp
    experts                           on the ranks that hold the same experts      expert_dp
    the resampler                     copies on every rank of every stage          tp x pp, then dp x cp
    their adapters, whole over etp    on the ranks that hold the same experts      etp, then expert_dp
    masters, states of whole ones     sharded over dp, copies over tp              tp
    the same of such adapters         sharded over expert_dp, copies over etp      etp
    a tied embedding                  on the first and the last stage              Megatron's embedding group

Each copy has a checksum of 64 bits. If the smallest and the largest checksum of the group differ, some copy differs.
All ranks of a stage have the same list of tensors, whatever their values, so all call the same collectives.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from gpt4moe.architecture.rows import Cut, Spread
from gpt4moe.model.parameters import buffers, shards
from gpt4moe.parallel.collectives import gather_rows
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.handed import checksum
from gpt4moe.training.engine import Engine

Copies = list[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Unequal:
    """A tensor whose copies are not equal."""

    name: str
    odd_ranks: list[int]
    """Ranks whose value is not the most frequent one. Of two equally frequent ones, the lower rank's is usual."""
    other_ranks: list[int]


def unequal_copies(engine: Engine, groups: ProcessGroups) -> list[Unequal]:
    """The tensors whose copies differ, of those that this rank holds a copy of. Collective."""
    engine.finish_update()
    live = {name: getattr(groups, name) for name in ("tp", "dp_cp", "expert_dp", "etp", "model")} | {
        "embedding": groups.megatron.embd
    }
    return [
        found
        for names, copies in _copies(engine, groups).items()
        for found in _compared(copies, [live[name] for name in names], groups)
    ]


def _copies(engine: Engine, groups: ProcessGroups) -> dict[tuple[str, ...], Copies]:
    """Groups whose ranks hold copies -> names and tensors, in the same order on every member."""
    stage, cut, experts, sharded, tied = ("tp", "dp_cp"), ("dp_cp",), ("expert_dp",), ("tp",), ("embedding",)
    adapters, sharded_adapters = ("etp", "expert_dp"), ("etp",)
    everywhere, sharded_everywhere = ("model", "dp_cp"), ("model",)
    table: dict[tuple[str, ...], Copies] = {
        stage: [],
        cut: [],
        experts: [],
        sharded: [],
        tied: [],
        adapters: [],
        sharded_adapters: [],
        everywhere: [],
        sharded_everywhere: [],
    }
    of_spread = {Spread.whole: stage, Spread.tp: cut, Spread.experts: experts}
    own_rules = {
        Cut.experts_whole: (adapters, sharded_adapters), Cut.everywhere: (everywhere, sharded_everywhere),
    }  # fmt: skip
    whole: dict[int, tuple[str, tuple[str, ...]]] = {}
    for parameter, shard, row in shards(engine.chunks, groups):
        over, its_states = own_rules.get(row.cut, (of_spread[row.cut.spread], sharded))
        if row.cut in own_rules or row.cut.spread is Spread.whole:
            whole[id(parameter)] = shard.name, its_states
        table[over].append((shard.name, parameter))
        if groups.layout.pp > 1 and getattr(parameter, "shared_embedding", False):
            table[tied].append((shard.name, parameter))
    table[stage] += [(shard.name, buffer) for buffer, shard in buffers(engine.chunks, groups)]
    for owned in engine.owned():
        if id(owned.parameter) in whole:
            tensor, over = whole[id(owned.parameter)]
            place = f"of {tensor}[{owned.start}:{owned.end}]"
            table[over] += [(f"fp32 master {place}", owned.master)]
            table[over] += [(f"{name} {place}", state) for name, state in owned.states.items()]
    return table


def _compared(copies: Copies, over: list[distributed.ProcessGroup], groups: ProcessGroups) -> Iterator[Unequal]:
    if not copies or all(group.size() == 1 for group in over):
        return
    mine = torch.stack([checksum(tensor).to(groups.device) for _, tensor in copies])
    least, largest = mine.clone(), mine.clone()
    for group in over:
        distributed.all_reduce(least, op=distributed.ReduceOp.MIN, group=group)
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=group)
    places = (least != largest).nonzero().flatten()  # the same on every member
    if not len(places):
        return
    held = torch.cat((torch.tensor([groups.rank], device=groups.device), mine[places])).unsqueeze(0)
    for group in over:
        held = gather_rows(held, group)
    held = held[held[:, 0].argsort()].cpu()
    ranks = held[:, 0].tolist()
    for column, place in enumerate(places.tolist(), start=1):
        values = held[:, column].tolist()
        usual = max(values, key=values.count)  # the first of equally frequent ones
        odd = [rank for rank, value in zip(ranks, values, strict=True) if value != usual]
        yield Unequal(copies[place][0], odd, [rank for rank in ranks if rank not in odd])
