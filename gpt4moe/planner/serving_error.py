"""How far off a plan of inference was for published deployments, by hardware, kind of model and quantity.

    benchmarks/inference_error.yaml --python -m benchmarks.inference_error kinds--> PUBLISHED --> intervals of a plan

Nothing was fitted to these rows. docs/plan-decisions.md has them by source.
"""

from enum import Enum

from gpt4moe.config.cluster import Generation
from gpt4moe.planner.efficiency import ErrorInterval
from gpt4moe.planner.serving import ServedModel, ServingLayout


class Quantity(str, Enum):
    """What was published."""

    throughput = "throughput"
    """Tokens per second; prices follow from it."""
    first_token = "first_token"
    """Seconds to the first token of a prompt that comes alone."""
    token = "token"
    """Seconds from a token to the next, with the prompts of other requests between."""


class ServedKind(str, Enum):
    """What decides how far off a deployment may be."""

    dense = "dense models"
    near = "models with experts inside an NVLink domain"
    far = "models with experts over several NVLink domains"


Kind = tuple[Generation, ServedKind, Quantity]

PUBLISHED: dict[Kind, tuple[int, float, float]] = {
    (Generation.hopper, ServedKind.dense, Quantity.throughput): (21, -0.182, 0.535),
    (Generation.hopper, ServedKind.dense, Quantity.first_token): (4, -0.387, 0.104),
    (Generation.hopper, ServedKind.dense, Quantity.token): (4, -0.223, 0.13),
    (Generation.hopper, ServedKind.near, Quantity.throughput): (18, -0.175, 0.281),
    (Generation.hopper, ServedKind.far, Quantity.throughput): (2, -0.77, -0.475),
    (Generation.ampere, ServedKind.dense, Quantity.throughput): (3, 0.001, 1.378),
    (Generation.ampere, ServedKind.dense, Quantity.first_token): (2, -0.272, -0.01),
}
"""Rows, and the least and the most of their signed errors: predicted / published - 1."""


def served_kind(served: ServedModel, layout: ServingLayout) -> ServedKind:
    if served.model.moe is None:
        return ServedKind.dense
    return ServedKind.near if layout.ep <= served.cluster.devices_per_nvlink_domain else ServedKind.far


def served_interval(served: ServedModel, layout: ServingLayout, quantity: Quantity) -> ErrorInterval | None:
    """How far off a number of a deployment may be; None: no row is known.

    Models with experts on Ampere have no row: Hopper's are taken, and `of` says so.
    """
    kind, generation = served_kind(served, layout), served.cluster.generation
    asked = [generation] + [Generation.hopper] * (generation is Generation.ampere and kind is not ServedKind.dense)
    found = next((one for one in asked if (one, kind, quantity) in PUBLISHED), None)
    if found is None:
        return None
    rows, least, most = PUBLISHED[found, kind, quantity]
    return ErrorInterval(of=f"{kind.value} on {found.value}", rows=rows, least=least, most=most)
