"""Core attention over a sequence that is cut over context-parallel ranks."""

from typing import Any

import torch

from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks

S, B, HEADS, GROUPS, WIDTH = 24, 2, 4, 2, 8
LAYERS, CP = 3, 2


def test_a_cut_sequence_attends_as_a_whole_one_and_layers_share_two_masks() -> None:
    for found in run_ranks(CP, _attended):
        assert found["difference"] < 1e-5  # fp32 in another order
        # Chunks of 6; ranks 0 and 1 hold chunks 0, 3 and 1, 2, of which chunk 0 needs no mask.
        ends = {0: [24], 1: [12, 18]}[found["rank"]]
        assert sorted(found["masks"]) == [6 * end * 4 for end in ends]


def _attended(environment: Environment) -> dict[str, Any]:
    from gpt4moe.model.attention import SdpaAttention
    from gpt4moe.parallel.placement import sequence_chunks
    from tests.moe.case import rank_groups

    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(S, B, heads, WIDTH, generator=generator) for heads in (HEADS, GROUPS, GROUPS)]
    with rank_groups(environment, cp=CP) as groups:
        rank = groups.cp.rank()
        own = torch.cat([torch.arange(S).chunk(2 * CP)[chunk] for chunk in sequence_chunks(CP, rank)])
        saved: dict[int, tuple[int, ...]] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dim() >= 2 and tensor.shape[-2] == S // (2 * CP) and tensor.isinf().any():
                storage = tensor.untyped_storage()
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            x = [part[own].clone().requires_grad_() for part in whole]
            layers = [SdpaAttention(None, layer, pg_collection=groups.megatron) for layer in range(LAYERS)]
            outputs = [layer(*x, None) for layer in layers]
        query, key, value = (part.permute(1, 2, 0, 3) for part in whole)
        want = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        want = want.permute(2, 0, 1, 3).reshape(S, B, -1)[own]
        difference = max((output - want).abs().max().item() for output in outputs)
        return {"rank": rank, "difference": difference, "masks": list(saved.values())}
