"""training.deterministic=true: what makes two equal runs on the same GPUs take the same kernels and sums.

    world, on a GPU  ->  set_deterministic_variables, before CUDA's libraries read them  ->  use_deterministic_kernels

A run on CPUs needs none of it: it is equal to the last bit anyway.
"""

import os
from collections.abc import MutableMapping

from gpt4moe.errors import ConfigError

DETERMINISTIC_VARIABLES = {
    # cuBLAS: each stream has a workspace of its own, so that matrix products take the same kernels (CUDA >= 10.2).
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # NCCL: sums over ranks in one order, whatever the size of a message and the state of the network.
    "NCCL_ALGO": ("Ring",),
    "NCCL_PROTO": ("Simple",),
    # Transformer Engine: no attention kernel whose backward pass adds in any order.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}
"""Name -> values that serve. The first is set where the user has set none."""


def set_deterministic_variables(variables: MutableMapping[str, str] = os.environ) -> None:
    """Sets DETERMINISTIC_VARIABLES. Call it before the first matrix product and the first collective on a GPU.

    Raises: ConfigError when the user has set one to a value that does not serve.
    """
    for name, serving in DETERMINISTIC_VARIABLES.items():
        if variables.setdefault(name, serving[0]).lower() not in map(str.lower, serving):  # NCCL reads either case
            raise ConfigError(
                f"{name}={variables[name]} is set, but training.deterministic=true needs {' or '.join(serving)}.",
                f"Unset {name}, or set training.deterministic=false.",
            )


def use_deterministic_kernels() -> None:
    """torch takes kernels that add in one order. Where it has none for an operation, that operation raises an error."""
    import torch

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # else a kernel for each empty tensor
