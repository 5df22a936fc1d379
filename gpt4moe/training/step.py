"""Losses and gradients of a global batch: this rank's micro-batches through Megatron's pipeline schedule.

What is minimized is the same on every layout:

    loss      = sum of the objective's losses over the global batch / its token count, known before the forward pass
    auxiliary = mean over all micro-batches of the global batch of (load-balancing + z losses, summed over layers)

Both carry their scale into the backward pass. Gradients are summed over ranks, and nothing is averaged afterwards. A
mean of the micro-batches' means would be wrong as soon as loss masks are uneven.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, distributed

from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import Batch
from gpt4moe.model.documents import PackedDocuments
from gpt4moe.model.parameters import language_chunks, moe_layers
from gpt4moe.moe.statistics import row_width, to_means, tokens_of_experts
from gpt4moe.objectives.objective import Objective
from gpt4moe.objectives.stages import objective_of
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.rng import tensor_key
from gpt4moe.runlog.metrics_table import refuse_undeclared
from gpt4moe.training.engine import Engine
from gpt4moe.training.images import ImageLatents


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """One pass over the global batch; the same numbers on every rank."""

    loss: float
    """Global mean by token count, without auxiliary terms."""
    num_tokens: float
    """The objective's token count of the global batch, 1 instead of 0; unmasked tokens for next-token prediction."""
    routing: Tensor
    """[layers, E + columns] fp64 on the CPU, a row for every layer (zeros for dense ones), over the global batch:
    moe.statistics has its columns by name."""
    sources: Tensor
    """[2, sources] fp64 on the CPU: of each data source, its losses and its tokens, both summed over the global batch;
    [2, 0] where there is one source alone."""
    logged: dict[str, float] = field(default_factory=dict)
    """Further numbers of the objective: sums over the global batch, divided by num_tokens."""


class StepRunner:
    """Runs the schedule for one engine, forward and backward or forward only.

    Args:
        num_sources: how many data sources there are. With several, Batch.source_index must be set.
        objective: what is minimized; None: the objective of the run's stage (objectives.stages).
    Raises: ConfigError, the same on every rank, when the objective logs a name that it must not (runlog.metrics_table).
    """

    def __init__(
        self,
        run: RunConfig,
        engine: Engine,
        groups: ProcessGroups,
        *,
        num_sources: int = 1,
        objective: Objective | None = None,
    ):
        self.run = run
        self.objective = objective or objective_of(run.stage)
        refuse_undeclared(self.objective.logged_names)
        self.engine = engine
        self.chunks = language_chunks(engine.chunks)
        self.images = None if run.model.vision is None else ImageLatents(run, engine, groups)
        self.groups = groups
        self.num_sources = num_sources if num_sources > 1 else 0
        self.schedule = get_forward_backward_func(
            pp_size=groups.layout.pp, vp_size=groups.layout.vpp if groups.layout.vpp > 1 else None
        )
        self.is_last_stage = groups.coordinate["pp"] == groups.layout.pp - 1
        self.moe_layers = moe_layers(engine.chunks)
        for layer, module in self.moe_layers.items():
            module.router.noise_key = tensor_key(run.run.seed, f"router noise {layer}")
        self.draws_noise = run.model.moe is not None and run.model.moe.router.input_jitter > 0

    def forward_backward(self, batches: list[Batch]) -> StepResult:
        """Adds the gradients of the global batch to the engine's buffers, zeroed before. Collective.

        Args:
            batches: this rank's micro-batches (data.loader.micro_batch_samples), the same number on every rank.
        """
        self.engine.zero_gradients()
        return self._run_schedule(batches, forward_only=False)

    def finish_step(self, result: StepResult) -> None:
        """Updates the routers' buffers from the load of the whole global batch. Called once a step, after the engine's
        update. The buffers of a frozen router stand still, as what they make even does not move."""
        trained = {layer: it for layer, it in self.moe_layers.items() if it.router.weight.requires_grad}
        for layer, module in trained.items():
            module.router.finish_step(tokens_of_experts(result.routing[layer]).to(self.groups.device))

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> StepResult:
        """The loss without gradients. Collective."""
        for chunk in self.engine.chunks:
            chunk.eval()
        result = self._run_schedule(batches, forward_only=True)
        for chunk in self.engine.chunks:
            chunk.train()
        return result

    def _run_schedule(self, batches: list[Batch], *, forward_only: bool) -> StepResult:
        batches = [self.objective.prepare(batch, self.run.run.seed) for batch in batches]
        documents = [self._documents(batch) for batch in batches]
        on_host, batches = batches, [batch.to(self.groups.device) for batch in batches]
        num_micro_batches = len(batches) * self.groups.layout.dp
        seq_length = batches[0].tokens.shape[1]  # of this step: training.length_ramp
        num_tokens, has_padding = self._global_tokens(batches)
        numbered = has_padding or (self.draws_noise and not forward_only)
        latents: list[dict[str, Any]] = [{}] * len(batches)
        if self.images is not None:
            latents = self.images.make(on_host, batches, with_gradient=not forward_only)
        batches = [batch.context_slice(self.groups.layout.cp, self.groups.coordinate["cp"]) for batch in batches]
        for layer in self.moe_layers.values():
            layer.auxiliary_scale = 1 / num_micro_batches
            layer.statistics.reset()

        def forward(iterator: Iterator[tuple[Batch, dict[str, Any], dict[str, Any]]], chunk: Any) -> tuple[Tensor, Any]:
            batch, attention, seen = next(iterator)
            token_ids = self._token_ids(batch, chunk) if numbered else None
            output = chunk(
                **self.objective.arguments(batch), padding_mask=token_ids, **attention, **_of_images(batch, seen)
            )
            return output, lambda output: self._scaled_loss(output, batch, num_tokens)

        iterators = [zip(batches, documents, latents, strict=True) for _ in self.chunks]
        interleaved = self.groups.layout.vpp > 1
        losses = self.schedule(
            forward_step_func=forward,
            data_iterator=iterators if interleaved else iterators[0],
            model=self.chunks if interleaved else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=seq_length,
            micro_batch_size=self.run.training.micro_batch_size,
            forward_only=forward_only,
        )
        if self.images is not None and not forward_only:
            self.images.finish()
        return self._gathered(losses, num_tokens, num_micro_batches)

    def _documents(self, batch: Batch) -> dict[str, Any]:
        """What the layers of every stage are told of a micro-batch's documents; nothing where it has none.

        Args:
            batch: whole sequences on the CPU.
        """
        if batch.documents is None:
            return {}
        cp, cp_index = self.groups.layout.cp, self.groups.coordinate["cp"]
        return {"packed_seq_params": PackedDocuments.of(batch.documents, self.groups.device, cp=cp, cp_index=cp_index)}

    def _global_tokens(self, batches: list[Batch]) -> tuple[float, bool]:
        """The token count of the global batch, and whether any rank has padding. Collective over dp.

        A count of 0 becomes 1, so that a fully masked batch has loss 0. All ranks must know of padding, because it
        changes how they call the layers.

        Args:
            batches: whole sequences, not cut over cp.
        """
        unmasked = torch.stack([self.objective.num_tokens(batch) for batch in batches]).sum()
        padding = [(batch.token_ids < 0).sum() for batch in batches if batch.token_ids is not None]
        count = torch.stack((unmasked, sum(padding, torch.zeros_like(unmasked))))
        distributed.all_reduce(count, group=self.groups.dp)
        num_tokens, num_padding = count.tolist()
        return num_tokens or 1.0, num_padding > 0

    def _token_ids(self, batch: Batch, chunk: Any) -> Tensor:
        """The padding_mask of a chunk's layers (moe.layer), [B, S/tp]. On the stage that embeds, and only there,
        Megatron cuts it over tp itself (megatron-core 0.16.1)."""
        assert batch.token_ids is not None, "noise or padding needs token_ids"
        if self.groups.layout.sequence_parallel and not chunk.module.pre_process:
            return batch.token_ids.chunk(self.groups.layout.tp, dim=1)[self.groups.coordinate["tp"]].contiguous()
        return batch.token_ids

    def _gathered(self, losses: list[dict[str, Any]], num_tokens: float, num_micro_batches: int) -> StepResult:
        """Sums losses, routing statistics and logged numbers of all ranks in one all-reduce over the world.

        The shape follows from the config and the objective alone, so it is the same on every rank.
        """
        model, device = self.run.model, self.groups.device
        shape = (model.num_layers + 1, row_width(model.moe.num_experts if model.moe else 0))
        size = shape[0] * shape[1]
        names, end = self.objective.logged_names, size + 2 * self.num_sources
        numbers = torch.zeros(end + len(names), dtype=torch.float64, device=device)
        table, sources = numbers[:size].view(shape), numbers[size:end].view(2, self.num_sources)
        for layer, module in self.moe_layers.items():
            table[layer] = module.statistics.read(device)
        if self.is_last_stage and self.groups.coordinate["tp"] == 0:
            table[-1, 0] = torch.stack([entry["loss"] for entry in losses]).sum(dtype=torch.float64)
            if self.num_sources:
                sources += torch.stack([entry["sources"] for entry in losses]).sum(dim=0)
            for place, name in enumerate(names, start=end):
                numbers[place] = torch.stack([entry["logged"][name] for entry in losses]).sum(dtype=torch.float64)
        distributed.all_reduce(numbers)
        to_means(table[:-1], num_micro_batches)
        numbers = numbers.cpu()
        table, sources = numbers[:size].view(shape), numbers[size:end].view(2, self.num_sources)
        logged = dict(zip(names, (numbers[end:] / num_tokens).tolist(), strict=True))
        return StepResult(
            loss=table[-1, 0].item(), num_tokens=num_tokens, routing=table[:-1], sources=sources, logged=logged
        )

    def _scaled_loss(self, output: Tensor, batch: Batch, num_tokens: float) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """This micro-batch's part of the global mean, in the three parts that Megatron's schedule expects: the loss,
        a token count (not used here), numbers to log."""
        found = self.objective.losses(output, batch)
        loss = found.losses.sum() / num_tokens
        # Cloned: Megatron's schedule scales losses in place.
        logged = {name: found.logged[name].detach().clone() for name in self.objective.logged_names}
        numbers: dict[str, Any] = {"loss": loss.detach().clone(), "logged": logged}
        if self.num_sources:
            assert batch.source_index is not None, "several sources, and a batch that does not say which it has"
            of_sequences = (
                torch.stack((found.losses.detach(), found.weights)).flatten(2).sum(dim=2, dtype=torch.float64)
            )
            sums = torch.zeros(2, self.num_sources, dtype=torch.float64, device=loss.device)
            numbers["sources"] = sums.index_add(1, batch.source_index, of_sequences)
        return loss, torch.zeros((), dtype=torch.int, device=loss.device), numbers


def _of_images(batch: Batch, latents: dict[str, Any]) -> dict[str, Any]:
    """What a chunk's layers are told of a micro-batch's images; nothing in a text model.

    Args:
        batch: this rank's part under context parallelism.
        latents: of ImageLatents.make.
    """
    if not latents:
        return {}
    media = torch.zeros_like(batch.tokens) if batch.media is None else batch.media
    return {"extra_block_kwargs": latents | {"context_mask": media}}
