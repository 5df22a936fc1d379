"""Casting without torch gives torch's bits."""

import numpy as np
import torch

from gpt4moe.convert.safetensors_file import Rounder, decoded


def test_rounding_equals_torch_for_every_upper_half_and_all_ties() -> None:
    upper = np.arange(2**16, dtype=np.uint32) << 16
    bits = np.concatenate([upper + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).astype(np.uint32)
    values = bits.view(np.float32)
    wanted = torch.from_numpy(values.copy()).to(torch.bfloat16)
    found = torch.from_numpy(Rounder()(values).view(np.int16)).view(torch.bfloat16)
    nan = wanted.isnan()
    assert found.isnan().equal(nan)
    assert found[~nan].view(torch.int16).equal(wanted[~nan].view(torch.int16))


def test_half_types_decode_to_the_same_values() -> None:
    values = torch.randn(1000)
    for dtype, name in ((torch.bfloat16, "BF16"), (torch.float16, "F16")):
        stored = values.to(dtype)
        data = stored.view(torch.uint8).numpy()
        assert np.array_equal(decoded(data, name), stored.float().numpy())
