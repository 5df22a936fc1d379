"""Core attention over a sequence that is cut over context-parallel ranks."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import bias
from torch.utils._python_dispatch import TorchDispatchMode

from gpt4moe.model import attention
from gpt4moe.model.documents import PackedDocuments
from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks

S, B, HEADS, GROUPS, WIDTH = 24, 2, 4, 2, 8
LAYERS, CP = 3, 2


def test_a_cut_sequence_attends_as_a_whole_one_and_layers_share_two_masks() -> None:
    for found in run_ranks(CP, _attended):
        assert found["difference"] < 1e-5  # fp32 in another order
        assert found["documents"] < 1e-5
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
            # Two documents begin in another chunk than they end, on another rank. The layers' masks serve here too.
            documents = torch.tensor([[0] * 4 + [1] * 7 + [2] * 9 + [3] * 4, [0] * 24])
            packed = PackedDocuments.of(documents, torch.device("cpu"), cp=CP, cp_index=rank)
            parted = layers[0](*x, None, packed_seq_params=packed)
        query, key, value = (part.permute(1, 2, 0, 3) for part in whole)
        want = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        want = want.permute(2, 0, 1, 3).reshape(S, B, -1)[own]
        difference = max((output - want).abs().max().item() for output in outputs)
        mask = (documents.unsqueeze(2) == documents.unsqueeze(1)).tril().unsqueeze(1)
        want = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        apart = (parted - want.permute(2, 0, 1, 3).reshape(S, B, -1)[own]).abs().max().item()
        return {"rank": rank, "difference": difference, "masks": list(saved.values()), "documents": apart}


def _parts(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The second of four chunks of queries, and keys and values up to its end, as SdpaAttention hands them on."""
    generator = torch.Generator().manual_seed(0)
    end = S // 2
    query, key, value = (torch.randn(S, B, heads, WIDTH, generator=generator) for heads in (HEADS, GROUPS, GROUPS))
    parts = (query[S // 4 : end], key[:end], value[:end])
    return tuple(x.to(device, dtype).requires_grad_() for x in parts)  # type: ignore[return-value]


def _attend(parts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return attention.SdpaAttention._attend(SimpleNamespace(softmax_scale=0.25), *parts)  # type: ignore[arg-type]


class _Operations(TorchDispatchMode):
    """Names of the operations, and the number of elements of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        results = [x for x in (made if isinstance(made, tuple) else (made,)) if isinstance(x, Tensor)]
        self.largest = max([self.largest, *(result.numel() for result in results)])
        return made


def test_where_flash_attention_takes_grouped_queries_there_is_neither_mask_nor_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The meta device stands for a GPU: torch's rules for shapes, with the answer that a GPU gives."""
    monkeypatch.setattr(attention, "_flash_takes", lambda *parts: True)
    parts = _parts("meta", torch.bfloat16)
    with _Operations() as seen:
        assert _attend(parts).shape == (S // 4, B, HEADS * WIDTH)
    assert "_scaled_dot_product_flash_attention" in seen.names
    assert seen.largest == parts[0].numel() < B * HEADS * (S // 4) * (S // 2)  # the number of scores


def test_flash_attention_is_called_as_torch_calls_it_for_queries_at_the_last_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch.nn.attention.bias.causal_lower_right is its name for this mask; on a CPU its numbers are ours."""
    calls: list[Any] = []

    def flash(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool, **rest: Any) -> tuple[Tensor]:
        calls.append((q.shape, k.shape, v.shape, dropout_p, is_causal, rest.get("scale")))
        return (q,)

    query, key, value = (x.permute(1, 2, 0, 3) for x in _parts("cpu", torch.float32))
    lower_right = bias.causal_lower_right(query.shape[2], key.shape[2])
    by_torch = partial(torch.nn.functional.scaled_dot_product_attention, query, key, value, lower_right)
    on_cpu = by_torch(scale=0.25, enable_gqa=True).permute(2, 0, 1, 3).flatten(2)
    assert _attend(_parts("cpu", torch.float32)).allclose(on_cpu, atol=1e-6)

    asked: list[Any] = []
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", flash)
    monkeypatch.setattr(attention, "_flash_takes", lambda *parts: asked.append(attention._flash_call(*parts)) or True)
    monkeypatch.setattr(bias, "can_use_flash_attention", lambda call: asked.append(call) or True)
    _attend(_parts("cpu", torch.float32))
    by_torch(scale=0.25, enable_gqa=True)
    assert len(calls) == 2 and calls[0] == calls[1]
    ours, theirs = ((one.attn_mask, one.dropout, one.is_causal, one.enable_gqa) for one in asked)
    assert ours == theirs, "torch must be asked what it asks itself, or a GPU says no"
