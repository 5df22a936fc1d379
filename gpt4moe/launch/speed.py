"""Times matrix products and messages of this rank. All ranks measure at the same time, as in training.

    a large product                    FLOP/s of each rank: finds a slow rank
    all-reduce, all-to-all, send       in each kind of group, all groups of a kind at once
    exchange with two other nodes      nodes pair up, then pair up with other partners; all ranks of a node exchange at
                                       once. A slow node is slow with both partners

Each time is the best of several, because a disturbance only makes a measurement longer.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, distributed

from gpt4moe.launch.evidence import GROUP_KINDS, Speeds, Timed
from gpt4moe.parallel.groups import ProcessGroups

REPEATS = 5
MATRIX_SIZE = {"cuda": 8192, "cpu": 512}
MATRIX_REPEATS = {"cuda": 100, "cpu": 20}
"""Half a second on a GPU: long enough to reach a sustained clock rate."""
MESSAGE_BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}

Operation = Callable[[], object]


def measure(groups: ProcessGroups, hosts: list[str], dtype: torch.dtype) -> Speeds:
    """Measures all speeds. Collective: every rank calls it.

    Args:
        hosts: the node of each rank.
        dtype: precision of the matrix products.
    """
    kind = groups.device.type
    size = MESSAGE_BYTES[kind]
    distributed.barrier()
    flops = matrix_flops(groups.device, dtype)
    messages = []
    for name in GROUP_KINDS:
        group = getattr(groups, name)
        if group.size() == 1:
            continue
        for operation, run in _operations(name, group, size, groups.device).items():
            messages.append(
                Timed(group=name, operation=operation, size_bytes=size, seconds=_best_seconds(run, groups.device))
            )
    return Speeds(device=kind, matrix_flops=flops, messages=messages, pairs=_pairs(groups, hosts, size))


def matrix_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, the best of several."""
    size = MATRIX_SIZE[device.type]
    a = torch.randn(size, size, dtype=dtype, device=device)
    b = torch.randn(size, size, dtype=dtype, device=device)
    result = torch.empty_like(a)
    run = partial(torch.mm, a, b, out=result)
    for _ in range(MATRIX_REPEATS[device.type] // 2):  # warms up clocks and caches
        run()
    seconds = _best_seconds(run, device, repeats=MATRIX_REPEATS[device.type])
    return 2 * float(size) ** 3 / seconds


def _best_seconds(run: Operation, device: torch.device, repeats: int = REPEATS) -> float:
    run()  # the first call makes connections
    times = []
    for _ in range(repeats):
        _finish(device)
        started = time.perf_counter()
        run()
        _finish(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _operations(
    name: str, group: distributed.ProcessGroup, size_bytes: int, device: torch.device
) -> dict[str, Operation]:
    size = size_bytes // 4 // group.size() * group.size()
    sent, received = torch.zeros(size, device=device), torch.empty(size, device=device)
    if name == "pp":
        ranks, mine = distributed.get_process_group_ranks(group), group.rank()
        later, earlier = ranks[(mine + 1) % len(ranks)], ranks[mine - 1]
        return {"send": partial(_exchange, sent, received, to=later, of=earlier, group=group)}
    return {
        "all_reduce": partial(distributed.all_reduce, sent, group=group),
        "all_to_all": partial(distributed.all_to_all_single, received, sent, group=group),
    }


def _exchange(
    sent: Tensor, received: Tensor, *, to: int, of: int, group: distributed.ProcessGroup | None = None
) -> None:
    """Sends to one rank while receiving from another."""
    messages = [
        distributed.P2POp(distributed.isend, sent, to, group),
        distributed.P2POp(distributed.irecv, received, of, group),
    ]
    for request in distributed.batch_isend_irecv(messages):
        request.wait()


def _pairs(groups: ProcessGroups, hosts: list[str], size_bytes: int) -> dict[str, float]:
    """Partner node -> bytes per second that this rank sends. A rank without a partner only waits."""
    rates = {}
    size = size_bytes // 4
    sent, received = torch.zeros(size, device=groups.device), torch.empty(size, device=groups.device)
    for partner in partners(hosts, groups.rank):
        if partner is not None:
            run = partial(_exchange, sent, received, to=partner, of=partner)
            rates[hosts[partner]] = size_bytes / _best_seconds(run, groups.device)
        distributed.barrier()
    return rates


def partners(hosts: list[str], rank: int) -> list[int | None]:
    """The rank of another node that `rank` exchanges with in each round, or None. All ranks have as many rounds.

    Nodes 0-1, 2-3, ... pair up, then 1-2, 3-4, ... and the last with the first. The n-th rank of a node exchanges with
    the n-th of the other.
    """
    nodes = list(dict.fromkeys(hosts))
    of_node = {node: [other for other, host in enumerate(hosts) if host == node] for node in nodes}
    mine, place = nodes.index(hosts[rank]), of_node[hosts[rank]].index(rank)
    found: list[int | None] = []
    for shift in range(min(2, len(nodes) - 1)):
        other = ((mine - shift) % len(nodes)) ^ 1
        ranks = of_node[nodes[(other + shift) % len(nodes)]] if other < len(nodes) else []
        found.append(ranks[place] if place < len(ranks) else None)
    return found
