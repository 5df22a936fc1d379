"""What a rank notes while it trains, by hooks on the model's parts. torch.

    margins      how near a router's nearest choice was to another one, and the end of an expert's slots to the next
    outputs      of every part of every layer, two numbers a token, in the first step: to find where a forward pass
                 begins to differ
    loss parts   of one process: what each auxiliary loss alone adds to its router's gradient, in the first step: to
                 tell which of them is wrong

The parts of a layer are outcome.PARTS. A token's two numbers are its vector times two fixed random directions, so they
do not depend on the layout, and a wrong element moves them.
"""

from collections.abc import Callable
from functools import lru_cache
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt4moe.architecture.names import ROUTER, layer_name
from gpt4moe.config.moe import DropPolicy, MoEConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.model.parameters import decoder_layers, language_chunks
from gpt4moe.moe.layer import ExpertParallelMLP, is_second_forward
from gpt4moe.moe.losses import auxiliary_losses, count_assignments
from gpt4moe.moe.pool import capacity
from gpt4moe.moe.routers.base import Routing
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.placement import sequence_chunks
from gpt4moe.proof.outcome import EMBEDDING_LAYER, LOSS_PARTS, OutputNote


class Watch:
    """Owns the notes of one phase on one rank."""

    def __init__(self, chunks: list[Any], run: RunConfig, groups: ProcessGroups):
        self.run, self.groups = run, groups
        self.is_alone = groups.layout.world_size == 1
        self.margins: list[float] = []
        """Of the step: the smallest margin of every call of a router; 0, where nothing was left to choose, aside."""
        self.slot_margins: list[float] = []
        """Of the step, in one process where probability decides who is dropped (slot_margin)."""
        self.outputs: list[OutputNote] = []
        self.loss_parts: dict[str, dict[str, np.ndarray]] = {}
        """Name of a router's matrix -> LOSS_PARTS -> gradient of that loss alone."""
        self.is_noting = False
        self._calls: dict[tuple[int, str], int] = {}
        for wrapped in language_chunks(chunks):
            self._watch_chunk(getattr(wrapped, "module", wrapped))

    def begin_step(self, *, note_outputs: bool) -> None:
        self.margins.clear()
        self.slot_margins.clear()
        self.is_noting = note_outputs

    def _watch_chunk(self, chunk: Any) -> None:
        if chunk.pre_process:
            self._hook(chunk.embedding, EMBEDDING_LAYER, "embedding")
        for index, layer in decoder_layers(chunk).items():
            layer.register_forward_pre_hook(self._note_input(index), with_kwargs=True)
            self._hook(layer.self_attention, index, "attention")
            if isinstance(layer.mlp, ExpertParallelMLP):
                self._watch_experts(layer.mlp, index)
            self._hook(layer.mlp, index, "mlp")
            self._hook(layer, index, "output")
        if chunk.post_process:
            chunk.register_forward_hook(lambda *given: self._note_losses(given[-1]))

    def _watch_experts(self, mlp: ExpertParallelMLP, index: int) -> None:
        mlp.router.register_forward_hook(lambda _, given, routing: self._note_routing(mlp, index, given, routing))
        plan, combine = mlp.dispatcher.plan, mlp.dispatcher.combine

        def noted_plan(expert_index: Tensor, keep: Tensor | None, *load: Tensor | None) -> Any:
            kept = torch.ones_like(expert_index, dtype=torch.bool) if keep is None else keep
            self._note(index, "slots", self._chosen(expert_index, kept))
            return plan(expert_index, keep, *load)

        def noted_combine(*given: Any) -> Tensor:
            output: Tensor = combine(*given)
            self._note(index, "experts", output.unflatten(0, (-1, self.run.training.micro_batch_size)))
            return output

        dispatcher: Any = mlp.dispatcher
        dispatcher.plan, dispatcher.combine = noted_plan, noted_combine
        if mlp.shared_experts is not None:
            self._hook(mlp.shared_experts, index, "shared experts")

    def _hook(self, module: Any, layer: int, part: str) -> None:
        def note(_: Any, given: Any, output: Any) -> None:
            self._note(layer, part, output[0] if isinstance(output, tuple) else output)

        module.register_forward_hook(note)

    def _note_input(self, index: int) -> Callable[..., None]:
        def note(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._note(index, "input", named["hidden_states"] if "hidden_states" in named else given[0])

        return note

    def _note_losses(self, losses_BS: Tensor) -> None:
        self._note(self.run.model.num_layers, "token loss", losses_BS.t().unsqueeze(-1))

    def _note_routing(self, mlp: ExpertParallelMLP, index: int, given: tuple[Any, ...], routing: Routing) -> None:
        token_ids = given[1] if len(given) > 1 else None
        margin = routing.margin[routing.margin != 0]
        if margin.numel():
            self.margins.append(margin.min().item())
        router = mlp.moe.router
        if router.capacity_factor and router.drop_policy is DropPolicy.probability and self.is_alone:
            chance = routing.probability.detach().gather(1, routing.expert_index)
            real = slice(None) if token_ids is None else token_ids >= 0  # padding takes no slot
            self.slot_margins.append(
                slot_margin(routing.expert_index[real], chance[real], mlp.moe, router.capacity_factor)
            )
        if self.is_noting and not is_second_forward():
            batch = self.run.training.micro_batch_size
            self._note(index, "router", routing.logits.unflatten(0, (-1, batch)))
            self._note(index, "choice", self._chosen(routing.expert_index, routing.weight))
            if self.is_alone and mlp.router.weight.requires_grad:
                self._add_loss_parts(mlp, index, routing, batch)

    def _add_loss_parts(self, mlp: ExpertParallelMLP, index: int, routing: Routing, batch: int) -> None:
        losses = auxiliary_losses(
            routing, None, load=count_assignments(routing.expert_index, None, mlp.moe.num_experts),
            settings=mlp.moe.router, load_share=mlp.router.load_share, pool=mlp.pool, batch=batch,
        )  # fmt: skip
        parts = self.loss_parts.setdefault(layer_name(index, ROUTER), {})
        for name, loss in zip(LOSS_PARTS, losses, strict=True):
            (gradient,) = torch.autograd.grad(loss * mlp.auxiliary_scale, mlp.router.weight, retain_graph=True)
            parts[name] = parts.get(name, 0.0) + gradient.cpu().numpy()

    def _chosen(self, expert_index_TK: Tensor, share_TK: Tensor) -> Tensor:
        """[S, B, 2]: a sum over the chosen experts, each with its share, that does not depend on their order."""
        assert self.run.model.moe is not None
        directions = _directions(self.run.model.moe.num_experts).to(expert_index_TK.device)
        value = (directions[expert_index_TK] * share_TK.detach().float().unsqueeze(-1)).sum(dim=1)
        return value.unflatten(0, (-1, self.run.training.micro_batch_size))

    @torch.no_grad()
    def _note(self, layer: int, part: str, values: Tensor) -> None:
        """Args:
        values: [S/cp, B, n] or, under sequence parallelism, [S/tp/cp, B, n]; n = 2: noted as it is.
        """
        if not self.is_noting or is_second_forward():
            return
        at, dp = self.groups.coordinate, self.groups.layout.dp
        call = self._calls.get((layer, part), 0)
        self._calls[layer, part] = call + 1
        values = values.detach().float()
        noted = values if values.shape[-1] == 2 else values @ _directions(values.shape[-1]).to(values.device)
        self.outputs.append(
            OutputNote(layer, part, at["dp"] + call * dp, self._positions(values.shape[0]), noted.cpu().numpy())
        )

    def _positions(self, rows: int) -> list[int]:
        """Where in their sequence this rank's `rows` stand, by the layout."""
        layout, at = self.groups.layout, self.groups.coordinate
        chunks = sequence_chunks(layout.cp, at["cp"])
        size = self.run.model.seq_length // (layout.cp * len(chunks))
        own = [position for chunk in chunks for position in range(chunk * size, (chunk + 1) * size)]
        return own if rows == len(own) else own[at["tp"] * rows : (at["tp"] + 1) * rows]


@lru_cache
def _directions(width: int) -> Tensor:
    """[width, 2], fixed."""
    return torch.randn(width, 2, generator=torch.Generator().manual_seed(width)) / width**0.5


def slot_margin(expert_index: Tensor, chance: Tensor, moe: MoEConfig, factor: float) -> float:
    """The smallest gap of probability between an expert's last slot and the best assignment that found none.

    Args:
        expert_index, chance: [T, K].
    """
    slots = capacity(len(expert_index), moe.num_experts, moe.top_k, factor)
    gaps = [inf]
    for expert in range(moe.num_experts):
        best = chance[expert_index == expert].sort(descending=True).values
        if len(best) > slots:
            gaps.append((best[slots - 1] - best[slots]).item())
    return float(np.min(gaps))
