"""Which tensors each rank of a tp x pp grid has for inference. No torch.

Matrices are cut over tp as in training. Experts are not cut: each tp rank has some whole experts. Tensors that training
does not cut are on every rank.
"""

from collections.abc import Iterable
from math import gcd

from gpt4moe.architecture.names import WORD_EMBEDDINGS, split_name
from gpt4moe.architecture.tensors import Box, inference_cut
from gpt4moe.config.model import ModelConfig, divisors
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.convert.weights import Weights
from gpt4moe.errors import ConversionError
from gpt4moe.parallel.placement import stage_layers


def rank_contents(
    weights: Weights, tp: int, pp: int, layers_per_stage: list[int] | None
) -> tuple[list[list[int]], dict[tuple[int, int], list[tuple[str, Box]]]]:
    """(layers of each stage, (tp index, pp index) -> the boxes of that rank).

    Raises: ConversionError when the grid does not fit the model.
    """
    stages = _stages(weights.model, tp, pp, layers_per_stage)
    return stages, {
        (t, p): rank_boxes(weights, _names_of(weights.model, weights.shapes, stages, p), t, tp)
        for p in range(pp)
        for t in range(tp)
    }


def file_name(tp_index: int, pp_index: int) -> str:
    return f"tp-{tp_index:02d}-pp-{pp_index:02d}.safetensors"


def key_of(name: str, box: Box) -> str:
    """The key of a box in a rank's file."""
    return f"{name}@{','.join(map(str, box[0]))}"


def rank_boxes(weights: Weights, names: list[str], tp_index: int, tp: int) -> list[tuple[str, Box]]:
    """The boxes of its stage's tensors that one rank has. Raises: ConversionError when tp does not divide one."""
    held = []
    for name in names:
        shape = weights.shapes[name]
        cut = inference_cut(weights.model, name, shape)
        if cut is None:
            held.append((name, ((0,) * len(shape), shape)))
            continue
        if cut.count % tp:
            raise ConversionError(f"--tp {tp} does not divide {cut.what}.", f"Set --tp to one of {_fitting(weights)}.")
        part, axis = shape[cut.axis] // tp, cut.axis
        offset = tuple(part * tp_index if dim == axis else 0 for dim in range(len(shape)))
        held.append((name, (offset, (*shape[:axis], part, *shape[axis + 1 :]))))
    return held


def _stages(model: ModelConfig, tp: int, pp: int, layers_per_stage: list[int] | None) -> list[list[int]]:
    """The layers of each pipeline stage. Raises: ConversionError when they do not fit the model."""
    given = layers_per_stage
    if given is not None and (len(given) != pp or sum(given) != model.num_layers or min(given) < 1):
        raise ConversionError(
            f"--layers-per-stage gives {len(given)} stages of {sum(given)} layers together; --pp is {pp} and "
            f"model.num_layers={model.num_layers}.",
            f"Give {pp} numbers of 1 or more that sum to {model.num_layers}, or leave it out.",
        )
    if tp < 1:
        raise ConversionError(f"--tp {tp} is below 1.", "Set --tp to 1 or more.")
    if not 1 <= pp <= model.num_layers:
        raise ConversionError(
            f"--pp {pp} does not fit model.num_layers={model.num_layers}.", f"Set --pp from 1 to {model.num_layers}."
        )
    return stage_layers(model.num_layers, ParallelConfig(pp=pp, layers_per_stage=given))


def _names_of(model: ModelConfig, names: Iterable[str], stages: list[list[int]], index: int) -> list[str]:
    """Tensors of a stage: its layers; first stage: the embedding; last stage: the output layer (or tied embedding)."""
    is_first, is_last = index == 0, index == len(stages) - 1
    found = []
    for name in names:
        layer, _ = split_name(name)
        if layer is not None:
            belongs = layer in stages[index]
        elif name == WORD_EMBEDDINGS:
            belongs = is_first or (is_last and model.tied_embeddings)
        else:
            belongs = is_last
        if belongs:
            found.append(name)
    return found


def _fitting(weights: Weights) -> list[int]:
    """The values of tp that divide every tensor."""
    cuts = (inference_cut(weights.model, name, shape) for name, shape in weights.shapes.items())
    return divisors(gcd(*(cut.count for cut in cuts if cut is not None)))
