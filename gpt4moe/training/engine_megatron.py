"""engine=megatron: Megatron-core's DistributedDataParallel and DistributedOptimizer as an Engine.

Gradients are fp32, in buffers of dense and of expert parameters, and are reduce-scattered during the backward pass. The
optimizer is sharded over the same ranks. The loss already carries its scale (training.step), so gradients are summed
over ranks, never averaged.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from torch import distributed, nn

from gpt4moe.config.optimizer import Dtype, EngineKind, TensorSettings
from gpt4moe.config.optimizer_table import optimizer_for
from gpt4moe.config.run import RunConfig
from gpt4moe.model.linear import fuse_weight_gradients
from gpt4moe.model.parameters import language_chunks
from gpt4moe.model.resampler import VisionChunk
from gpt4moe.model.transformer_config import TORCH_DTYPES
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.training.engine import (
    OwnedRange,
    check_states,
    clip_gradients,
    counted_parameters,
    finalize,
    gradient_norm,
    own_keys,
    parameter_settings,
)  # fmt: skip


class MegatronEngine:
    """Owns the wrapped chunks, their gradient buffers and the sharded optimizer, as long as a run lasts."""

    def __init__(self, chunks: list[nn.Module], run: RunConfig, groups: ProcessGroups):
        self.groups = groups
        self.kept = optimizer_for(run.optimizer.kind, EngineKind.megatron)
        self.clip_norm = run.optimizer.clip_norm
        self.chunks = _wrap(chunks, run, groups)
        if run.kernels.weight_gradients.is_fused(on_gpu=groups.device.type == "cuda", engine=EngineKind.megatron):
            for chunk in self.chunks:
                fuse_weight_gradients(chunk)
        self.optimizer = get_megatron_optimizer(
            _optimizer_config(run, self.kept.engines[EngineKind.megatron]),
            self.chunks,
            use_gloo_process_groups=False,
            pg_collection=groups.megatron,
        )
        for group in self.optimizer.param_groups:
            # Megatron's own scheduler would multiply these; we do not use it, and without the product norms decay too.
            group["weight_decay"] = run.optimizer.weight_decay * group["wd_mult"]
        if any(isinstance(inner.optimizer, torch.optim.AdamW) for inner in self._inner()):
            check_states(run.optimizer.kind, self.kept, torch.optim.AdamW)
        self.counted = counted_parameters(self.chunks, groups)
        self._start_states(step=0)
        self._split_groups(parameter_settings(self.chunks, run, groups))
        self._connect_schedule(run)

    def zero_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def reduce(self) -> None:
        self.optimizer.prepare_grads()

    def sum_copies(self, chunk: Any) -> None:
        if self.groups.model.size() > 1:
            for buffer in chunk.buffers:
                distributed.all_reduce(buffer.grad_data, group=self.groups.model)
        chunk.finish_grad_sync()

    def norm(self) -> float:
        return gradient_norm(self.owned(), self.counted, self.groups.device)

    def clip(self, norm: float) -> None:
        clip_gradients(self.owned(), norm, self.clip_norm)

    def update(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_factor", 1.0)
        for inner in self._inner():
            # Not the optimizer's own step: it ends with a gather of every weight of its chunks. The dense and the
            # expert optimizer would each gather all of them, so twice the bytes (megatron-core 0.16.1).
            MixedPrecisionOptimizer.step_with_ready_grads(inner)
        for chunk in self.chunks:
            chunk.start_param_sync(force_dispatch=True)

    def finish_update(self) -> None:
        for chunk in self.chunks:
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                if group.param_gather_handle is not None:
                    group.param_gather_handle.wait()
                    group.param_gather_handle = None

    def owned(self) -> Iterator[OwnedRange]:
        for inner in self._inner():
            pairs = (
                (inner.model_float16_groups, inner.shard_fp32_from_float16_groups),
                (inner.model_fp32_groups, inner.shard_fp32_groups),
            )
            # Not model_param_group_index_map: it pairs wrongly when a group mixes dtypes (megatron-core 0.16.1).
            for parameters, masters in pairs:
                for group, group_masters in zip(parameters, masters, strict=True):
                    for parameter, master in zip(group, group_masters, strict=True):
                        place = inner._get_model_param_range_map(parameter)["param"]
                        states = {name: inner.optimizer.state[master][name] for name in self.kept.states}
                        yield OwnedRange(parameter, place.start, place.end, master, states)

    def finish_load(self, step: int) -> None:
        self._start_states(step)
        for inner in self._inner():
            inner._copy_main_params_to_model_params()
        for chunk in self.chunks:
            chunk.start_param_sync(force_sync=True)

    def _inner(self) -> list[Any]:
        optimizers = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return [inner for inner in optimizers if not getattr(inner, "is_stub_optimizer", False)]

    def _start_states(self, step: int) -> None:
        """Makes the optimizer's missing states, as zeros, and sets the step count: torch's Adam has a tensor for each
        parameter, Transformer Engine's and apex's a number for each group."""
        for inner in self._inner():
            torch_adam = isinstance(inner.optimizer, torch.optim.AdamW)
            for group in inner.optimizer.param_groups:
                if torch_adam:
                    group["fused"], group["foreach"] = True, False  # one kernel; four times foreach's speed on CPU
                else:
                    group["step"] = step
                for master in group["params"]:
                    state = inner.optimizer.state[master]
                    for name in self.kept.states:
                        if name not in state:
                            state[name] = torch.zeros_like(master)
                    if torch_adam and self.kept.step_name is not None:
                        state[self.kept.step_name] = torch.tensor(float(step), device=master.device)

    def _split_groups(self, settings: dict[int, TensorSettings]) -> None:
        """Gives the masters of parameters with settings of their own to groups of their own. Megatron pairs parameters
        with masters by lists of its own, which do not change."""
        of_master = {id(owned.master): settings.get(id(owned.parameter)) for owned in self.owned()} if settings else {}
        for inner in self._inner() if settings else ():
            groups = []
            for group in inner.optimizer.param_groups:
                parts: dict[int, list[Any]] = {}
                known = {id(its): its for its in settings.values()}
                for master in group["params"]:
                    parts.setdefault(id(of_master[id(master)]), []).append(master)
                groups += [group | {"params": masters} | own_keys(known.get(key)) for key, masters in parts.items()]
            inner.optimizer.param_groups = groups

    def _connect_schedule(self, run: RunConfig) -> None:
        """Makes Megatron's schedule reduce gradients only in the last micro-batch, and call `finalize` at its end."""
        config = self.chunks[0].config
        config.finalize_model_grads_func = finalize
        no_sync = [chunk.no_sync for chunk in language_chunks(self.chunks)]
        config.no_sync_func = no_sync if run.parallel.vpp > 1 else no_sync[0]


def _wrap(chunks: list[nn.Module], run: RunConfig, groups: ProcessGroups) -> list[Any]:
    if run.precision.dtype is not Dtype.fp32:
        chunks = [chunk.to(TORCH_DTYPES[run.precision.dtype]) for chunk in chunks]
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=run.engine.overlap_grad_reduce,
        overlap_param_gather=run.engine.overlap_param_gather,
        bucket_size=run.engine.bucket_size,
    )
    # disable_bucketing would join all-gathers of several dtypes into one, which gloo corrupts silently. The resampler
    # has one dtype. Its copies must lie alike on every stage, and Megatron makes buckets on the first stage alone.
    wrapped = [
        DistributedDataParallel(
            chunk.config, config, chunk, disable_bucketing=isinstance(chunk, VisionChunk),
            pg_collection=groups.megatron,
        )
        for chunk in chunks
    ]  # fmt: skip
    for chunk in wrapped:
        _skip_groups_of_one(chunk)
        # With overlap_param_gather: update() begins all gathers at once. Else Megatron would begin one when the bucket
        # before it is waited for, and expects modules to run in the order in which their buckets lie.
        chunk.overlap_param_gather_with_optimizer_step = run.engine.overlap_param_gather
    return wrapped


class _Done:
    """The handle of a collective that has ended."""

    def wait(self) -> None: ...


def _skip_groups_of_one(chunk: Any) -> None:
    """Leaves out reduce-scatter and all-gather where the group is one rank: Megatron-core 0.16.1 calls them even then,
    and gloo copies the buffers, which is 4% of a tiny step."""
    for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
        if group.intra_distributed_optimizer_instance_size == 1:
            group.start_grad_sync = partial(_gradients_are_whole, group)
            group.start_param_sync = partial(_weights_are_whole, group)


def _gradients_are_whole(group: Any, force_all_reduce: bool = False) -> None:
    assert all(bucket.gradient_scaling_factor == 1.0 for bucket in group.buckets)
    group.grad_reduce_handle = _Done() if group.ddp_config.overlap_grad_reduce else None


def _weights_are_whole(group: Any, force_sync: bool = False) -> None:
    group.param_gather_dispatched = True


def _optimizer_config(run: RunConfig, name: str) -> MegatronOptimizerConfig:
    settings = run.optimizer
    return MegatronOptimizerConfig(
        optimizer=name,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        clip_grad=0.0,  # clip() does it, by a norm of our own (training.engine)
        bf16=run.precision.dtype is Dtype.bf16,
        params_dtype=TORCH_DTYPES[run.precision.dtype],
        use_distributed_optimizer=True,
    )
