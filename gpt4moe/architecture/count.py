"""Numbers of parameters: of a whole model, of what one token uses (active), of one rank."""

from dataclasses import dataclass
from functools import partial

from gpt4moe.architecture.rows import Component, Spread
from gpt4moe.architecture.tensors import (
    ModelTensor,
    embedding_tensors,
    layer_tensors,
    model_tensors,
    output_tensors,
    resampler_tensors,
)
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.parallel.placement import rank_chunks


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Parameters of a model, and the active ones: those that one token uses (top_k of the experts)."""

    total: int
    per_component: dict[str, int]
    """By the name of a Component, for those that the model has."""
    active: int
    """Active parameters of the layers alone, without embedding and output layer: the N of 6N (277.5B of GPT-4)."""
    active_with_head: int
    """The same with the output layer, whose matrix product is computed whether it is tied or not (278.5B of GPT-4)."""
    active_with_embeddings: int
    """The same with the embedding too: what model cards call active (12.9B of Mixtral 8x7B)."""


@dataclass(frozen=True, slots=True)
class RankParameters:
    """Parameters that one rank holds. Dense ones have copies over dp x cp, experts over expert_dp."""

    dense: int
    expert: int

    @property
    def total(self) -> int:
        return self.dense + self.expert


def count_parameters(model: ModelConfig) -> ParameterCount:
    """The exact numbers of the model as it would be built."""
    per_component: dict[str, int] = {}
    active = partial(active_size, model)
    of_layers = outside = 0
    for tensor in model_tensors(model):
        kind = tensor.component
        per_component[kind.value] = per_component.get(kind.value, 0) + tensor.size
        if kind in (Component.embedding, Component.output_layer):
            outside += tensor.size
        elif kind is not Component.resampler:  # images pass it, not tokens
            of_layers += active(tensor)
    head = model.vocab_size * model.hidden_size
    return ParameterCount(
        total=sum(per_component.values()),
        per_component=per_component,
        active=of_layers,
        active_with_head=of_layers + head,
        active_with_embeddings=of_layers + outside,
    )


def active_size(model: ModelConfig, tensor: ModelTensor) -> int:
    """The elements of a tensor that one token uses."""
    if tensor.component is not Component.experts:
        return tensor.size
    assert model.moe is not None
    return tensor.size // model.moe.num_experts * model.moe.top_k


def chunk_tensors(model: ModelConfig, parallel: ParallelConfig, pp_index: int) -> list[list[ModelTensor]]:
    """The tensors of each virtual stage of one pipeline rank, in the order in which Megatron registers them; of a
    vision model the resampler is one more chunk, the last.

    Their shapes are those of the whole tensors; ModelTensor.local_size has a rank's part. With tied embeddings and
    pp > 1, the last stage has a copy of the embedding in place of the output layer.
    """
    chunks = []
    stages = rank_chunks(model.num_layers, parallel, pp_index)
    for vp_stage, layers in enumerate(stages):
        tensors = [tensor for layer in layers for tensor in layer_tensors(model, layer)]
        if pp_index == 0 and vp_stage == 0:
            tensors = embedding_tensors(model) + tensors
        if pp_index == parallel.pp - 1 and vp_stage == parallel.vpp - 1:
            tensors += output_tensors(model)
            if model.tied_embeddings and parallel.pp > 1:
                tensors += embedding_tensors(model)
        chunks.append(tensors)
    return [*chunks, resampler_tensors(model)] if model.vision is not None else chunks


def rank_parameters(model: ModelConfig, parallel: ParallelConfig, pp_index: int) -> RankParameters:
    """The parameters of any rank of one pipeline stage: all of them hold equally many."""
    sizes = {True: 0, False: 0}
    for chunk in chunk_tensors(model, parallel, pp_index):
        for tensor in chunk:
            sizes[tensor.spread is Spread.experts] += tensor.local_size(parallel)
    return RankParameters(dense=sizes[False], expert=sizes[True])
