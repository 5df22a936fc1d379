"""Random numbers that depend on what they are for, not on the rank that draws them.

A row of a weight is drawn by a counter-based generator (Philox, Salmon et al. 2011) keyed by (seed, tensor name, row):
a rank draws only its own part, and the numbers are equal on every layout and device. For the same reason, noise on
activations is a hash of (key, counter) in integer arithmetic.
"""

import hashlib

import numpy as np
import torch


def tensor_key(seed: int, name: str) -> int:
    """A hash of (seed, name), 64 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


def normal_box(
    seed: int, name: str, global_shape: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...]
) -> torch.Tensor:
    """The box [offset, offset + shape) of a logical tensor of standard normal numbers, fp32, on the CPU.

    Args:
        global_shape: of the whole tensor; its last axis is a row.
    """
    if len(shape) == 1:  # a vector is one row
        return normal_box(seed, name, (1, *global_shape), (0, *offset), (1, *shape)).view(shape)
    row_length, first_column, num_columns = global_shape[-1], offset[-1], shape[-1]
    key = tensor_key(seed, name)
    out = np.empty((int(np.prod(shape[:-1], dtype=np.int64)), num_columns), dtype=np.float32)
    local = np.indices(shape[:-1], dtype=np.int64).reshape(len(shape) - 1, -1).T + np.array(offset[:-1], dtype=np.int64)
    rows = local @ _strides(global_shape[:-1])
    for place, row in enumerate(rows.tolist()):
        generator = np.random.Generator(np.random.Philox(key=np.array([key, row], dtype=np.uint64)))
        out[place] = generator.standard_normal(row_length, dtype=np.float32)[first_column : first_column + num_columns]
    return torch.from_numpy(out).view(shape)


def counter_uniform(key: int, counter: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in [0, 1), fp32, each a function of (key, its counter) alone, on the counter's device.

    splitmix64 (Steele et al. 2014): a Weyl sequence that starts at the key, then a 64-bit finaliser. The top 24 bits
    are kept.

    Args:
        key: 64 bits (tensor_key). counter: int64, any shape, not negative.
    """
    value = counter * _signed(0x9E3779B97F4A7C15) + _signed(key)
    value = (value ^ _shifted(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shifted(value, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(value ^ _shifted(value, 31), 40).to(torch.float32) / 2**24


def _shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
    """A right shift that fills with zeros. torch's own fills with the sign."""
    return (value >> bits) & ((1 << 64 - bits) - 1)


def _signed(bits: int) -> int:
    """64 bits as torch's int64, whose products wrap around."""
    return bits - (1 << 64) if bits >> 63 else bits


def _strides(shape: tuple[int, ...]) -> np.ndarray:
    strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
    return np.array(strides, dtype=np.int64)
