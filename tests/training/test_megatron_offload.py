"""Why engine.offload_optimizer is refused under engine=megatron: what Megatron-core's offloading cannot do."""

from contextlib import nullcontext
from unittest.mock import MagicMock, patch

import pytest
import torch


def test_megatrons_offloading_optimizer_cannot_step_weights_of_a_cpu() -> None:
    """When a newer Megatron can, its layouts can be proved here, and config.optimizer can accept them."""
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    weight = torch.nn.Parameter(torch.ones(4))
    streams = {"current_stream": lambda *_: MagicMock(), "stream": lambda _: nullcontext()}
    with patch.multiple(torch.cuda, **streams):
        optimizer = HybridDeviceOptimizer(
            [{"params": [weight]}], offload_fraction=1.0, cpu_optimizer_cls=torch.optim.AdamW,
            gpu_optimizer_cls=torch.optim.AdamW, param_update_in_fp32=True, pin_cpu_grads=False, pin_cpu_params=False,
            overlap_cpu_optimizer_d2h_h2d=False, lr=0.1,
        )  # fmt: skip
        weight.grad = torch.ones(4)
        with pytest.raises(KeyError):
            optimizer.step()
