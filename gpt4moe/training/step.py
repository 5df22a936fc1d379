"""One step: this rank's micro-batches through Megatron's pipeline schedule.

The objective, the same on every layout:

    loss      = sum of token losses over the global batch / its unmasked tokens, known before the backward pass
    auxiliary = mean over all micro-batches of the global batch of (load-balancing + z losses, summed over layers)

Gradients of both are summed over ranks and nothing is averaged afterwards. A mean of micro-batch means would be wrong
as soon as loss masks are uneven.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, distributed

from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import Batch
from gpt4moe.moe.layer import ExpertParallelMLP
from gpt4moe.moe.statistics import row_width, to_means, tokens_of_experts
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.rng import tensor_key
from gpt4moe.training.engine import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """One pass over the global batch; the same numbers on every rank."""

    loss: float
    """Global token mean, without auxiliary terms."""
    num_tokens: int
    """Unmasked tokens."""
    routing: Tensor
    """[layers, E + columns] fp64 on the CPU, a row for every layer (zeros for dense ones), over the global batch:
    moe.statistics has its columns by name."""
    sources: Tensor
    """[2, sources] fp64 on the CPU: loss summed over the unmasked tokens of each data source, and those tokens; empty
    where there is one source alone."""


class StepRunner:
    """Runs the schedule for one engine, forward and backward or forward only.

    Args:
        num_sources: of the data; with several, batches say which one each sequence is of.
    """

    def __init__(self, run: RunConfig, engine: Engine, groups: ProcessGroups, *, num_sources: int = 1):
        self.run = run
        self.engine = engine
        self.groups = groups
        self.num_sources = num_sources if num_sources > 1 else 0
        self.schedule = get_forward_backward_func(
            pp_size=groups.layout.pp, vp_size=groups.layout.vpp if groups.layout.vpp > 1 else None
        )
        self.is_last_stage = groups.coordinate["pp"] == groups.layout.pp - 1
        self.moe_layers = _moe_layers(engine.chunks)
        for layer, module in self.moe_layers.items():
            module.router.noise_key = tensor_key(run.run.seed, f"router noise {layer}")
        self.draws_noise = run.model.moe is not None and run.model.moe.router.input_jitter > 0

    def forward_backward(self, batches: list[Batch]) -> StepResult:
        """Gradients of the global batch into the engine's buffers. Collective.

        Args:
            batches: this rank's micro-batches (data.sampler), the same number on every rank.
        """
        self.engine.zero_gradients()
        return self._walk(batches, forward_only=False)

    def finish_step(self, result: StepResult) -> None:
        """Moves the routers' buffers, by the whole global batch's load. After the engine's update, once a step."""
        for layer, module in self.moe_layers.items():
            module.router.finish_step(tokens_of_experts(result.routing[layer]).to(self.groups.device))

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> StepResult:
        """The loss alone. Collective."""
        for chunk in self.engine.chunks:
            chunk.eval()
        result = self._walk(batches, forward_only=True)
        for chunk in self.engine.chunks:
            chunk.train()
        return result

    def _walk(self, batches: list[Batch], *, forward_only: bool) -> StepResult:
        batches = [_on_device(batch, self.groups.device) for batch in batches]
        num_micro_batches = len(batches) * self.groups.layout.dp
        num_tokens, has_padding = self._global_tokens(batches)
        numbered = has_padding or (self.draws_noise and not forward_only)
        batches = [batch.context_slice(self.groups.layout.cp, self.groups.coordinate["cp"]) for batch in batches]
        for layer in self.moe_layers.values():
            layer.auxiliary_scale = 1 / num_micro_batches
            layer.statistics.reset()

        def forward(iterator: Iterator[Batch], chunk: Any) -> tuple[Tensor, Any]:
            batch = next(iterator)
            token_ids = self._token_ids(batch, chunk) if numbered else None
            output = chunk(batch.tokens, batch.position_ids, None, labels=batch.labels, padding_mask=token_ids)
            return output, lambda token_losses: self._scaled_loss(token_losses, batch, num_tokens)

        iterators = [iter(batches) for _ in self.engine.chunks]
        interleaved = self.groups.layout.vpp > 1
        losses = self.schedule(
            forward_step_func=forward,
            data_iterator=iterators if interleaved else iterators[0],
            model=self.engine.chunks if interleaved else self.engine.chunks[0],
            num_microbatches=len(batches),
            seq_length=self.run.model.seq_length,
            micro_batch_size=self.run.training.micro_batch_size,
            forward_only=forward_only,
        )
        return self._gathered(losses, num_tokens, num_micro_batches)

    def _global_tokens(self, batches: list[Batch]) -> tuple[int, bool]:
        """Unmasked tokens of the global batch, at least 1, so that a fully masked batch has loss 0; and whether any
        rank has padding, so that all take the same way through the layers.

        Args:
            batches: whole sequences, not cut over cp.
        """
        unmasked = torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in batches]).sum()
        padding = [(batch.token_ids < 0).sum() for batch in batches if batch.token_ids is not None]
        count = torch.stack((unmasked, sum(padding, torch.zeros_like(unmasked))))
        distributed.all_reduce(count, group=self.groups.dp)
        num_tokens, num_padding = count.tolist()
        return max(1, round(num_tokens)), num_padding > 0

    def _token_ids(self, batch: Batch, chunk: Any) -> Tensor:
        """What a chunk's layers get as padding_mask (moe.layer): [B, S/tp] each, but Megatron cuts it over tp itself on
        the stage that embeds, and only there (megatron-core 0.16.1)."""
        assert batch.token_ids is not None, "noise or padding needs token_ids"
        if self.groups.layout.sequence_parallel and not chunk.module.pre_process:
            return batch.token_ids.chunk(self.groups.layout.tp, dim=1)[self.groups.coordinate["tp"]].contiguous()
        return batch.token_ids

    def _gathered(self, losses: list[dict[str, Tensor]], num_tokens: int, num_micro_batches: int) -> StepResult:
        """One all-reduce over the world, of a table whose shape follows from the config alone."""
        model, device = self.run.model, self.groups.device
        shape = (model.num_layers + 1, row_width(model.moe.num_experts if model.moe else 0))
        size = shape[0] * shape[1]
        numbers = torch.zeros(size + 2 * self.num_sources, dtype=torch.float64, device=device)
        table, sources = numbers[:size].view(shape), numbers[size:].view(2, self.num_sources)
        for layer, module in self.moe_layers.items():
            table[layer] = module.statistics.read(device)
        if self.is_last_stage and self.groups.coordinate["tp"] == 0:
            table[-1, 0] = torch.stack([entry["loss"] for entry in losses]).sum(dtype=torch.float64)
            if self.num_sources:
                sources += torch.stack([entry["sources"] for entry in losses]).sum(dim=0)
        distributed.all_reduce(numbers)
        to_means(table[:-1], num_micro_batches)
        numbers = numbers.cpu()
        table, sources = numbers[:size].view(shape), numbers[size:].view(2, self.num_sources)
        return StepResult(loss=table[-1, 0].item(), num_tokens=num_tokens, routing=table[:-1], sources=sources)

    def _scaled_loss(
        self, token_losses: Tensor, batch: Batch, num_tokens: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the global token mean. Megatron's three-part answer: loss, tokens (unused),
        logged."""
        masked = token_losses.float() * batch.loss_mask
        loss = masked.sum() / num_tokens
        # Cloned: Megatron's schedule scales losses in place.
        logged = {"loss": loss.detach().clone()}
        if self.num_sources:
            assert batch.source_index is not None, "several sources, and a batch that does not say which it has"
            of_samples = torch.stack((masked.detach(), batch.loss_mask)).sum(dim=2, dtype=torch.float64)
            sums = torch.zeros(2, self.num_sources, dtype=torch.float64, device=loss.device)
            logged["sources"] = sums.index_add(1, batch.source_index, of_samples)
        return loss, torch.zeros((), dtype=torch.int, device=loss.device), logged


def _on_device(batch: Batch, device: torch.device) -> Batch:
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return Batch(
        **{name: None if value is None else value.to(device, non_blocking=True) for name, value in fields.items()}
    )


def _moe_layers(chunks: list[Any]) -> dict[int, ExpertParallelMLP]:
    """Global layer index -> its expert-parallel MLP, for the layers of this rank."""
    return {
        layer.layer_number - 1: layer.mlp
        for chunk in chunks
        for layer in chunk.module.decoder.layers
        if isinstance(layer.mlp, ExpertParallelMLP)
    }
