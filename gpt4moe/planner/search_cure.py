"""What to do where a search finds nothing: changes that were tried, so that a layout fits with them as they stand.

no legal layout -> fewer devices, another batch | none fits -> more devices (and batch), roomier devices
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from math import ceil

from gpt4moe.architecture.count import count_parameters
from gpt4moe.config.load import known_clusters
from gpt4moe.config.model import divisors
from gpt4moe.config.plan import PlanConfig
from gpt4moe.planner.candidates import Pool
from gpt4moe.planner.state_bytes import GRADIENT_BYTES, VALUE_BYTES, owned_bytes

MOST_TRIES = 6
"""Device counts, batches or clusters that are tried of each kind."""


def legal_cure(plan: PlanConfig) -> str:
    """Of a plan without a legal layout."""
    gpus, batch = plan.gpus or 1, plan.training.global_batch_size
    fewer = range(gpus - (gpus % 8 or 8), 0, -8)
    counts = next((f"gpus={n}" for n in islice(fewer, MOST_TRIES) if _finds(plan, n, batch)), None)
    near = sorted({n * max(1, round(batch / n)) for n in divisors(gpus)} - {batch}, key=lambda n: (abs(n - batch), n))
    batches = (f"training.global_batch_size={n}" for n in near[:MOST_TRIES] if _finds(plan, gpus, n))
    return _said([counts, next(batches, None)], "Choose gpus with many divisors, and a batch that they divide.")


def room_cure(plan: PlanConfig) -> str:
    """Of a plan whose legal layouts all need more memory."""
    gpus, batch = plan.gpus or 1, plan.training.global_batch_size
    more = next((said for count, size, said in _more_devices(plan) if _finds(plan, count, size)), None)
    roomier = sorted(
        (c for c in known_clusters() if c.memory_bytes > plan.cluster.memory_bytes and c.usd_per_hour is not None),
        key=lambda cluster: cluster.memory_bytes,
    )
    fits = (c.name for c in roomier[:MOST_TRIES] if _finds(replace(plan, cluster=c), gpus, batch))
    cluster = next((f"cluster={name}" for name in fits), None)
    return _said([more, cluster], "Take more devices and a larger batch, or a smaller model.")


def _said(changes: list[str | None], otherwise: str) -> str:
    found = [change for change in changes if change]
    return f"Set {', or '.join(found)}: a layout fits then." if found else otherwise


def _more_devices(plan: PlanConfig) -> Iterator[tuple[int, int, str]]:
    """Multiples of the devices, from the fewest that hold all states, each once, doubled: with the batch as it is, and
    grown with them."""
    gpus, batch = plan.gpus or 1, plan.training.global_batch_size
    each = VALUE_BYTES[plan.precision.dtype] + GRADIENT_BYTES + owned_bytes(plan)
    needed = count_parameters(plan.model).total * each / plan.cluster.memory_bytes
    times = max(2, ceil(needed / gpus))
    for _ in range(4):
        yield gpus * times, batch, f"gpus={gpus * times}"
        yield gpus * times, batch * times, f"gpus={gpus * times} training.global_batch_size={batch * times}"
        times *= 2


def _finds(plan: PlanConfig, gpus: int, batch: int) -> bool:
    training = replace(plan.training, global_batch_size=batch, micro_batch_size=1)
    return bool(Pool.of(replace(plan, training=training, top=1), gpus).take()[0])
