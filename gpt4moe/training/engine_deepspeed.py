"""engine=deepspeed: DeepSpeed's engine with ZeRO-1 as an Engine; its optimizer may be in host memory.

    Megatron's schedule over chunks, gradients add up in fp32           (deepspeed_partition)
    -> finalize: sums over tp and of tied embeddings                    (Megatron's, by the marks on parameters)
    -> reduce: one reduce-scatter per parameter group                   (deepspeed_partition)
    -> norm, clip: the rule of every engine                             (engine)
    -> update: DeepSpeed's step and its all-gather of the new weights

DeepSpeed 0.19.8 gets one module that contains every chunk. It never calls the module: Megatron's schedule calls the
chunks.
"""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed import DeepSpeedConfig
from deepspeed import DeepSpeedEngine as DeepSpeedRuntime
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer import MegatronModule
from torch import distributed, nn

from gpt4moe.config.optimizer import Dtype, EngineKind, TensorSettings
from gpt4moe.config.optimizer_table import Optimizer, optimizer_for
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel import deepspeed_groups
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.training.deepspeed_partition import Partition
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


class DeepSpeedEngine:
    """Owns DeepSpeed's engine and the gradients of its parameter groups, as long as a run lasts."""

    def __init__(self, chunks: list[nn.Module], run: RunConfig, groups: ProcessGroups):
        self.groups = groups
        self.kept = optimizer_for(run.optimizer.kind, EngineKind.deepspeed)
        self.clip_norm = run.optimizer.clip_norm
        self.counted = counted_parameters(chunks, groups)
        self.runtime = _runtime(chunks, run, groups, self.kept)
        self.chunks: list[Any] = [_Chunk(chunk) for chunk in chunks]
        self.optimizer = self.runtime.optimizer
        self.partitions = [
            Partition(self.optimizer, index, self.kept.states) for index in range(len(self.optimizer.bit16_groups))
        ]
        self.weights = [part for part in self.partitions if part.parameters[0] is not self.runtime.module[-1].weight]
        self._start_states(step=0)
        self.chunks[0].config.finalize_model_grads_func = finalize

    def zero_gradients(self) -> None:
        for partition in self.partitions:
            partition.zero_gradients()

    def reduce(self) -> None:
        for partition in self.partitions:
            partition.reduce()

    def sum_copies(self, chunk: Any) -> None:
        if self.groups.model.size() > 1:
            for parameter in chunk.parameters():
                if parameter.requires_grad:
                    distributed.all_reduce(parameter.grad, group=self.groups.model)

    def norm(self) -> float:
        return gradient_norm(self.owned(), self.counted, self.groups.device)

    def clip(self, norm: float) -> None:
        clip_gradients(self.owned(), norm, self.clip_norm)

    def update(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_factor", 1.0)
        for partition in self.partitions:
            partition.hand_over()
        self.runtime.step()

    def finish_update(self) -> None: ...

    def owned(self) -> Iterator[OwnedRange]:
        for partition in self.weights:
            yield from partition.owned()

    def finish_load(self, step: int) -> None:
        self._start_states(step)
        self.optimizer.update_lp_params()

    def _start_states(self, step: int) -> None:
        """Makes the optimizer's missing states, as zeros, and sets the step count: one of each per parameter group."""
        for partition in self.partitions:
            for name in self.kept.states:
                partition.state.setdefault(name, torch.zeros_like(partition.master))
            if self.kept.step_name is not None:
                partition.state[self.kept.step_name] = torch.tensor(float(step), device=partition.master.device)


class _Chunk(MegatronModule):
    """A GPTModel with the interface that Megatron's schedule and its finalize call. The data-parallel sum is left to
    DeepSpeedEngine.reduce."""

    def __init__(self, chunk: Any):
        super().__init__(config=chunk.config)
        self.module = chunk
        self.ddp_config = DistributedDataParallelConfig()

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)

    def finish_grad_sync(self, force_all_reduce: bool = False) -> None: ...


class _Nothing(nn.Module):
    """One number that no gradient reaches, trained where a stage trains nothing but experts or nothing at all:
    DeepSpeed's optimizer refuses to have no parameters, and its first group must not be of experts (0.19.8)."""

    def __init__(self, chunks: list[nn.Module]):
        super().__init__()
        every = [parameter for chunk in chunks for parameter in chunk.parameters()]
        needed = not any(parameter.requires_grad and not _is_expert(parameter) for parameter in every)
        self.weight = nn.Parameter(torch.zeros_like(every[0].flatten()[:1]), requires_grad=needed)


class _Runtime(DeepSpeedRuntime):
    """DeepSpeed's engine, with two answers corrected: which ranks have experts, and that weights are equal already."""

    def _configure_distributed_model(self, model: nn.Module) -> None:
        super()._configure_distributed_model(model)
        # DeepSpeed looks for MoE classes of its own. Each rank answers for itself: a stage may have dense layers only.
        self.has_moe_layers = any(_is_expert(p) for p in model.parameters() if p.requires_grad)

    def _broadcast_model(self) -> None:
        """Sends nothing: initial weights are a function of the seed, the same on every rank and layout."""

    def __del__(self) -> None:
        """Leaves all to the garbage collector. DeepSpeed's destructor imports a module, and the collector may come in
        the middle of another import, which then fails with a KeyError before Python 3.12."""


def _runtime(chunks: list[nn.Module], run: RunConfig, groups: ProcessGroups, kept: Optimizer) -> Any:
    mpu = deepspeed_groups.lend(groups)
    model = nn.ModuleList([*chunks, _Nothing(chunks)])
    settings = run.optimizer
    optimizer_class = getattr(torch.optim, kept.engines[EngineKind.deepspeed])
    check_states(settings.kind, kept, partial(optimizer_class, lr=settings.lr, **kept.arguments(settings)))
    optimizer = optimizer_class(
        _split(
            _parameter_groups(model, settings.weight_decay, deepspeed_groups.expert_group_name(groups)),
            parameter_settings(chunks, run, groups),
        ),
        lr=settings.lr,
        **kept.arguments(settings),
    )
    config = _settings(run, on_gpu=groups.device.type == "cuda")
    runtime = _Runtime(
        args=SimpleNamespace(device_rank=groups.device.index or 0),
        model=model,
        optimizer=optimizer,
        mpu=mpu,
        config=config,
        config_class=DeepSpeedConfig(config, mpu),
    )
    # Hooks of a backward pass that DeepSpeed would run itself: they would reduce after every micro-batch.
    for hook in runtime.optimizer._grad_acc_hooks:
        hook.remove()
    runtime.optimizer.compute_grad_norm = False  # its configuration refuses this together with offload
    return runtime


def _settings(run: RunConfig, *, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration. Its batch sizes have no effect, because the schedule is Megatron's."""
    zero: dict[str, Any] = {"stage": 1, "overlap_comm": False, "contiguous_gradients": False}
    if run.engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "bf16": {"enabled": run.precision.dtype is Dtype.bf16, "check_grad_overflow": False},
        "gradient_clipping": 0.0,  # clip() does it
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW: DeepSpeed's own CPU Adam wants a C++ compiler at the first start.
        "zero_force_ds_cpu_optimizer": False,
    }


def _parameter_groups(model: nn.Module, weight_decay: float, expert_group: str) -> list[dict[str, Any]]:
    """Dense weights, norms, experts, a tied embedding, and copies on every stage (the resampler's), each a group of its
    own.

    Experts are summed over other ranks. Norms do not decay. A tied embedding is on the first and the last stage: in a
    group of its own it is cut over dp in the same places on both, so that three and more ranks add up its gradients in
    one order. Otherwise the two copies would move apart by a rounding in every step. So it is with the resampler.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    experts = [parameter for parameter in parameters if _is_expert(parameter)]
    for parameter in experts:
        parameter.group_name = expert_group  # type: ignore[attr-defined]
    tied = [parameter for parameter in parameters if getattr(parameter, "shared_embedding", False)]
    copied = [parameter for parameter in parameters if getattr(parameter, "on_every_stage", False)]
    apart = {id(parameter) for parameter in (*experts, *tied, *copied)}
    dense = [parameter for parameter in parameters if id(parameter) not in apart]
    made = [
        {"params": tied, "weight_decay": weight_decay, "name": "tied"},
        {"params": [p for p in dense if p.ndim > 1], "weight_decay": weight_decay, "name": "dense"},
        {"params": [p for p in dense if p.ndim <= 1], "weight_decay": 0.0, "name": "norms"},
        {"params": [p for p in copied if p.ndim > 1], "weight_decay": weight_decay, "name": "copied"},
        {"params": [p for p in copied if p.ndim <= 1], "weight_decay": 0.0, "name": "copied norms"},
        {"params": experts, "weight_decay": weight_decay, "name": expert_group, "moe": True},
    ]
    return [group for group in made if group["params"]]


def _split(groups: list[dict[str, Any]], settings: dict[int, TensorSettings]) -> list[dict[str, Any]]:
    """The groups, of which parameters with settings of their own are apart."""
    made = []
    for group in groups:
        parts: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(id(settings.get(id(parameter))), []).append(parameter)
        made += [
            group | {"params": parameters} | own_keys(settings.get(id(parameters[0]))) for parameters in parts.values()
        ]
    return made


def _is_expert(parameter: nn.Parameter) -> bool:
    """By the mark that model.parameters sets and that Megatron and DeepSpeed both read."""
    return not getattr(parameter, "allreduce", True)
