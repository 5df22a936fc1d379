"""One parameter group of DeepSpeed's ZeRO-1 optimizer: its flat weights, and the partition that this rank steps.

    weights    | p0 | p1 ...........| p2 | padding |    the model's parameters are views of it      (DeepSpeed's)
    gradients  | p0 | p1 ...........| p2 | padding |    fp32, parameters' .grad are views of it     (ours)
               |<--- rank 0 --->|<--- rank 1 ----->|    master and states: one rank's cut (DeepSpeed's)

Gradients are ours because DeepSpeed 0.19.8 reduces them in a way that fits no pipeline: it hooks a backward pass of its
own, adds micro-batches in bf16, averages, and all-reduces where a reduce-scatter would do. Here torch adds each
micro-batch into the fp32 buffer, and one reduce-scatter leaves the sum where DeepSpeed's step reads it, without a copy.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from torch import Tensor, distributed

from gpt4moe.training.engine import OwnedRange


class Partition:
    """Owns the fp32 gradients of the group `index`, and knows where DeepSpeed keeps the rest."""

    def __init__(self, optimizer: DeepSpeedZeroOptimizer, index: int, states: Sequence[str]):
        self.optimizer, self.index, self.states = optimizer, index, states
        self.parameters = optimizer.bit16_groups[index]
        self.offsets: list[int] = optimizer.round_robin_bit16_offsets[index]
        self.group: distributed.ProcessGroup = optimizer.real_dp_process_group[index]
        weights = optimizer.bit16_groups_flat[index]
        self.gradients = torch.zeros(weights.numel(), dtype=torch.float32, device=weights.device)
        size = int(optimizer.partition_size[index])
        self.start = size * self.group.rank()
        self.gradient = self.gradients.narrow(0, self.start, size)
        for parameter in self.parameters:
            parameter.grad_dtype = torch.float32  # bf16 gradients are added to the fp32 ones as they come

    @property
    def master(self) -> Tensor:
        """This rank's cut of the fp32 weights, flat, padding at its end; on the host when the optimizer is there."""
        return self.optimizer.single_partition_of_fp32_groups[self.index].detach()

    @property
    def state(self) -> dict[str, Any]:
        """The inner optimizer's state tensors of the whole cut (config.optimizer_table)."""
        return self.optimizer.optimizer.state[self.optimizer.single_partition_of_fp32_groups[self.index]]

    def zero_gradients(self) -> None:
        self.gradients.zero_()
        # Every time: DeepSpeed's step lets go of .grad.
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            parameter.grad = self.gradients.narrow(0, offset, parameter.numel()).view(parameter.shape)

    def reduce(self) -> None:
        """The sum over the group, of this rank's cut. Collective."""
        if self.group.size() > 1:
            distributed.reduce_scatter_single(self.gradient, self.gradients, group=self.group)
        if self.optimizer.cpu_offload:
            self._stepped_gradient().copy_(self.gradient)

    def hand_over(self) -> None:
        """Gives the reduced and clipped gradient to DeepSpeed's next step."""
        if not self.optimizer.cpu_offload:
            self.optimizer.averaged_gradients[self.index] = GradPartitionBufferGroup([], self.gradient)

    def _stepped_gradient(self) -> Tensor:
        """The gradient of the cut where the optimizer reads it."""
        if self.optimizer.cpu_offload:
            return self.optimizer.single_partition_of_fp32_groups[self.index].grad
        return self.gradient

    def owned(self) -> Iterator[OwnedRange]:
        """The parameters' ranges in this rank's cut, in order; a parameter may straddle several ranks."""
        end = self.start + self.gradient.numel()
        master, gradient = self.master, self._stepped_gradient()
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            first, last = max(offset, self.start), min(offset + parameter.numel(), end)
            if first >= last:
                continue
            place = (0, first - self.start, last - first)
            own = master.narrow(*place)
            own.grad = gradient.narrow(*place)
            cut = {name: self.state[name].narrow(*place) for name in self.states}
            yield OwnedRange(parameter, first - offset, last - offset, own, cut)
