"""Which layouts of a deployment can be cut: the one of the keys inference.*, and all of so many devices.

heads, query groups, experts, vocabulary -> degrees of tp -> copies of tp x pp -> how many copies share experts
"""

from collections.abc import Iterator
from math import gcd

from gpt4moe.architecture.tensors import embedding_tensors, inference_cut, output_tensors
from gpt4moe.config.model import divisors
from gpt4moe.config.plan import PlanConfig
from gpt4moe.errors import LayoutError
from gpt4moe.planner.serving import ServingLayout
from gpt4moe.planner.work import timed_kinds


def asked_layout(plan: PlanConfig) -> ServingLayout:
    """The layout of the keys inference.*. Raises: LayoutError if the model cannot be cut so, or gpus do not divide."""
    config, model = plan.inference, plan.model
    tp, pp = config.tp, config.pp
    if pp > model.num_layers:
        raise LayoutError(
            f"inference.pp={pp} is more than model.num_layers={model.num_layers}.",
            f"Set inference.pp from 1 to {model.num_layers}.",
        )
    legal = tensor_degrees(plan)
    if tp not in legal:
        raise LayoutError(
            f"inference.tp={tp} does not divide the heads, query groups, experts or vocabulary of {model.name}, or is "
            f"more than an NVLink domain ({plan.cluster.devices_per_nvlink_domain} devices).",
            f"Set inference.tp to one of {', '.join(map(str, legal))}.",
        )
    experts = model.moe.num_experts if model.moe else tp
    ep = config.ep or tp
    if ep % tp or experts % ep:
        fitting = [d for d in divisors(experts) if d % tp == 0]
        raise LayoutError(
            f"inference.ep={ep} is no multiple of inference.tp={tp} that divides "
            f"{f'the {experts} experts' if model.moe else 'anything: the model has no experts'}.",
            f"Set inference.ep to one of {', '.join(map(str, fitting))}, or leave it out.",
        )
    size, sharing = tp * pp, ep // tp
    gpus = plan.gpus or size * sharing
    if gpus % (size * sharing):
        raise LayoutError(
            f"gpus={gpus} is no multiple of inference.tp={tp} x pp={pp} x {sharing} copies that share experts.",
            f"Set gpus={max(1, gpus // (size * sharing)) * size * sharing}, or other degrees.",
        )
    return ServingLayout(tp=tp, pp=pp, copies=gpus // size, sharing=sharing)


def tensor_degrees(plan: PlanConfig) -> list[int]:
    """The values of tp over which to-inference can cut the model, inside an NVLink domain."""
    model, counts = plan.model, [plan.model.num_attention_heads]
    tensors = [*embedding_tensors(model), *output_tensors(model)]
    tensors += [tensor for kind in {id(kind): kind for kind in timed_kinds(model)}.values() for tensor in kind.tensors]
    cuts = (inference_cut(model, tensor.name, tensor.shape) for tensor in tensors)
    counts += [cut.count for cut in cuts if cut is not None]
    return [tp for tp in divisors(gcd(*counts)) if tp <= plan.cluster.devices_per_nvlink_domain]


def layouts(plan: PlanConfig, gpus: int) -> Iterator[ServingLayout]:
    """Every layout of so many devices that to-inference can cut: copies of tp x pp, and how many share experts."""
    experts = plan.model.moe.num_experts if plan.model.moe else 1
    for tp in (d for d in tensor_degrees(plan) if gpus % d == 0):
        for pp in (d for d in divisors(gpus // tp) if d <= plan.model.num_layers):
            copies = gpus // (tp * pp)
            for sharing in divisors(copies):
                if sharing == 1 or experts % (tp * sharing) == 0:
                    yield ServingLayout(tp=tp, pp=pp, copies=copies, sharing=sharing)
