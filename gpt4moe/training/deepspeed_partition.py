"""One parameter group of DeepSpeed's ZeRO-1 optimizer: its flat weights, and the partition that this rank updates.

    weights    | p0 | p1 ...........| p2 | padding |    the model's parameters are views of it      (DeepSpeed's)
    gradients  | p0 | p1 ...........| p2 | padding |    fp32, parameters' .grad are views of it     (ours)
               |<--- rank 0 --->|<--- rank 1 ----->|    master and states: one rank's cut (DeepSpeed's)

The gradients are our own, because DeepSpeed 0.19.8 reduces them in a way that does not fit a pipeline: it hooks its own
backward pass, adds micro-batches in bf16, averages, and all-reduces where a reduce-scatter is enough. Here torch adds
each micro-batch to the fp32 buffer. One reduce-scatter then leaves the sum where DeepSpeed's step reads it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from torch import Tensor, distributed

from gpt4moe.training.engine import OwnedRange


class Partition:
    """Owns the fp32 gradients of parameter group `index`; reads the weights and states where DeepSpeed keeps them."""

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
            parameter.grad_dtype = torch.float32  # autograd adds each bf16 gradient to the fp32 one

    @property
    def master(self) -> Tensor:
        """This rank's part of the fp32 weights: flat, padded at the end; offloaded ones are in host memory."""
        return self.optimizer.single_partition_of_fp32_groups[self.index].detach()

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state tensors of this rank's part (config.optimizer_table)."""
        return self.optimizer.optimizer.state[self.optimizer.single_partition_of_fp32_groups[self.index]]

    def zero_gradients(self) -> None:
        self.gradients.zero_()
        # Set in every step, because DeepSpeed's step sets .grad to None.
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            parameter.grad = self.gradients.narrow(0, offset, parameter.numel()).view(parameter.shape)

    def reduce(self) -> None:
        """Sums the gradients of this rank's part over the group. Collective."""
        if self.group.size() > 1:
            distributed.reduce_scatter_single(self.gradient, self.gradients, group=self.group)
        if self.optimizer.cpu_offload:
            self._stepped_gradient().copy_(self.gradient)

    def hand_over(self) -> None:
        """Puts the reduced and clipped gradient where DeepSpeed's step reads it."""
        if not self.optimizer.cpu_offload:
            self.optimizer.averaged_gradients[self.index] = GradPartitionBufferGroup([], self.gradient)

    def _stepped_gradient(self) -> Tensor:
        """The gradient of this rank's part, in the tensor that the optimizer reads."""
        if self.optimizer.cpu_offload:
            return self.optimizer.single_partition_of_fp32_groups[self.index].grad
        return self.gradient

    def owned(self) -> Iterator[OwnedRange]:
        """The ranges of parameters in this rank's part, in order. A parameter may lie in the parts of several ranks."""
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
