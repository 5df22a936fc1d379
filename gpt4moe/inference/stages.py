"""Stages: one step through all pipeline stages of this copy of the model, by its ranks together.

    tokens [T] -> embedding -> stage 0 --[T/tp, 1, H]--> stage 1 ... --> last rows -> output layer -> logits [rows, V]

Parts of the chunks are called one by one, not GPTModel.forward: attention to a cache is an argument of the decoder, and
only the last token of a row goes through the vocabulary. No flag of a chunk's config is changed. With virtual stages a
step walks round the ranks vpp times.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, distributed, nn

from gpt4moe.inference.attention import StepAttention, rotary_factors
from gpt4moe.model.gated_attention import VisionLayer
from gpt4moe.model.parameters import moe_layers
from gpt4moe.model.rotary import FusedRotaryAttention
from gpt4moe.model.specs import RecomputedLayer, RecomputedVisionLayer
from gpt4moe.parallel.collectives import gather_rows
from gpt4moe.parallel.groups import ProcessGroups

LogitsOf = Callable[[Tensor], Tensor]
"""Index [rows] of tokens of a step -> their logits [rows, V]."""
Reader = Callable[[LogitsOf], Tensor]


class Stages:
    """Owns the messages between stages. Call `finish` when no step follows.

    Args:
        chunks: GPTModels of this rank, wrapped or not, one for each virtual stage.
    """

    def __init__(self, chunks: list[Any], groups: ProcessGroups):
        self.chunks: list[Any] = [getattr(chunk, "module", chunk) for chunk in chunks]
        self.groups = groups
        self.config = self.chunks[0].config
        ring = distributed.get_process_group_ranks(groups.pp)
        at = groups.pp.rank()
        self.following, self.previous = ring[(at + 1) % len(ring)], ring[at - 1]
        self.sent: deque[tuple[Any, Tensor]] = deque()
        """Sends under way, with what they send: it must live until they are done."""

    def run(self, attention: StepAttention, read: Reader | None = None) -> Tensor | None:
        """Logits [rows, V] of the step's ends, or what `read` makes of them, on the ranks of the last stage; None on
        the others. Collective."""
        num_stages, rank = len(self.chunks) * self.groups.pp.size(), self.groups.pp.rank()
        logits = None
        for stage in range(rank, num_stages, self.groups.pp.size()):
            chunk = self.chunks[stage // self.groups.pp.size()]
            hidden = self._through(chunk, attention, self._receive(attention) if stage else None)
            if stage < num_stages - 1:
                self._send(hidden.contiguous())
            else:
                logits_of = self._output(chunk, hidden)
                logits = logits_of(attention.step.ends) if read is None else read(logits_of)
        return logits

    def finish(self) -> None:
        """Waits until all that was sent has arrived."""
        while self.sent:
            self.sent.popleft()[0].wait()

    def _through(self, chunk: Any, attention: StepAttention, received: Tensor | None) -> Tensor:
        """The embedding, if this is the first stage, and the layers: [T/tp, 1, H]."""
        step = attention.step
        hidden = received
        if hidden is None:
            hidden = chunk.embedding(input_ids=step.tokens[None], position_ids=step.positions[None])
        ids = step.token_ids
        if ids is not None and self.config.sequence_parallel:
            ids = ids.chunk(self.groups.tp.size())[self.groups.tp.rank()]
        if attention.rotary is None:
            inverse = chunk.rotary_pos_emb.inv_freq.to(step.positions.device)
            attention.rotary = rotary_factors(inverse, step.positions, self.config.params_dtype)
        for layer in chunk.decoder.layers:
            hidden = through_layer(layer, hidden, attention, None if ids is None else ids[None])
        norm = chunk.decoder.final_layernorm
        return hidden if norm is None else norm(hidden)

    def _output(self, chunk: Any, hidden: Tensor) -> LogitsOf:
        """Logits of any of the step's tokens, whole on every rank of tp. Collective over tp, and so is each call."""
        tp = self.groups.tp
        whole = gather_rows(hidden, tp) if self.config.sequence_parallel else hidden
        tied = chunk.share_embeddings_and_output_weights
        weight = chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight

        def logits_of(places: Tensor) -> Tensor:
            part = torch.nn.functional.linear(whole[places, 0], weight)
            return gather_rows(part.t(), tp).t() if tp.size() > 1 else part

        return logits_of

    def _receive(self, attention: StepAttention) -> Tensor:
        length = attention.step.tokens.shape[0]
        if self.config.sequence_parallel:
            length //= self.groups.tp.size()
        shape, dtype = (length, 1, self.config.hidden_size), self.config.params_dtype
        hidden = torch.empty(shape, dtype=dtype, device=self.groups.device)
        distributed.recv(hidden, self.previous, group=self.groups.pp)
        return hidden

    def _send(self, hidden: Tensor) -> None:
        self.sent.append((distributed.isend(hidden, self.following, group=self.groups.pp), hidden))
        while len(self.sent) > 2 * len(self.chunks):
            self.sent.popleft()[0].wait()


def through_layer(
    layer: TransformerLayer, hidden: Tensor, attention: StepAttention | None, token_ids: Tensor | None
) -> Tensor:
    """hidden [T/tp, 1, H] after a layer, to the last bit as layer.forward has it.

    Megatron's forward pass and its loop over layers look around each part for what only training has: recompute,
    offloading, dropout, profiler ranges. On a CPU that takes a tenth of a token's time.
    A layer of another class is called. Tokens of a vision model attend to the images of `attention` first.
    """
    if type(layer) in (VisionLayer, RecomputedVisionLayer):
        if layer.gated_cross_attention is not None:
            images = None if attention is None else attention.images
            attend = None if images is None else partial(images.attend, layer.layer_number)
            hidden = layer.gated_cross_attention.apply_to(hidden, attend)
    elif type(layer) not in (TransformerLayer, RecomputedLayer):
        out: Tensor = layer(hidden, attention_mask=None, packed_seq_params=attention, padding_mask=token_ids)[0]
        return out
    hidden = hidden + _attended(layer.self_attention, layer.input_layernorm(hidden), attention)
    out, _ = layer.mlp(layer.pre_mlp_layernorm(hidden), padding_mask=token_ids)
    return hidden + out


def _attended(module: nn.Module, hidden: Tensor, attention: StepAttention | None) -> Tensor:
    """As module.forward; the attention of a step needs nothing of what stands between its parts there."""
    if attention is None or type(module) not in (SelfAttention, FusedRotaryAttention):
        out: Tensor = module(hidden, attention_mask=None, packed_seq_params=attention)[0]
        return out
    if not module.config.qk_layernorm:
        # Megatron would copy the queries apart, and attention puts them beside the keys again.
        mixed, _ = module.linear_qkv(hidden)
        out, _ = module.linear_proj(module.core_attention.attend_mixed(mixed, attention))
        return out
    query, key, value = module.get_query_key_value_tensors(hidden)
    out, _ = module.linear_proj(module.core_attention(query, key, value, None, packed_seq_params=attention))
    return out


@contextmanager
def generating(chunks: list[nn.Module]) -> Iterator[None]:
    """Chunks in evaluation, without gradients, their MoE layers dropping and counting nothing; afterwards as before."""
    was_training = [chunk.training for chunk in chunks]
    moe = list(moe_layers(chunks).values())
    try:
        for chunk in chunks:
            if chunk.training:  # a walk over all modules, which a model that was loaded to generate needs once
                chunk.eval()
        for mlp in moe:
            mlp.is_generating = True
        # Not inference_mode: a tensor made in it that a module keeps could not be used in training afterwards.
        with torch.no_grad():
            yield
    finally:
        for mlp in moe:
            mlp.is_generating = False
        for chunk, training in zip(chunks, was_training, strict=True):
            if training:
                chunk.train()
