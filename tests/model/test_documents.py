"""Attention inside documents: equal to a mask, and to a document alone; no influence of others; what GPUs are given."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gpt4moe.config.load import load_run_config
from gpt4moe.data.batch import places_in_documents
from gpt4moe.model import documents as subject
from gpt4moe.model.attention import SdpaAttention
from gpt4moe.model.documents import PackedDocuments
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.placement import sequence_chunks
from tests.spawn import run_ranks

S, B, HEADS, GROUPS, WIDTH, SCALE = 24, 3, 4, 2, 8, 0.3
ROWS = [[5, 1, 9, 9], [24], [11, 13]]
CPU = torch.device("cpu")


def numbered(rows: list[list[int]]) -> Tensor:
    """Batch.documents of these lengths."""
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((S, B, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS))
    return tuple(torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)  # type: ignore[return-value]


def masked(query: Tensor, key: Tensor, value: Tensor, documents: Tensor) -> Tensor:
    """One call with a mask of all pairs."""
    mask = (documents.unsqueeze(2) == documents.unsqueeze(1)).tril().unsqueeze(1)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE, enable_gqa=True)
    return out.permute(2, 0, 1, 3).flatten(2)


def core() -> SdpaAttention:
    groups = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1))
    return SdpaAttention(None, 1, pg_collection=groups, softmax_scale=SCALE)


def gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((out * weights).sum(), inputs))


def test_documents_attend_as_under_a_mask_of_all_pairs() -> None:
    parts, documents = drawn(), numbered(ROWS)
    got = core()(*parts, None, packed_seq_params=PackedDocuments.of(documents, CPU))
    want = masked(*parts, documents)
    assert got.shape == (S, B, HEADS * WIDTH)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
    for ours, theirs in zip(gradients(got, *parts), gradients(want, *parts), strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=0)


def test_rows_of_one_document_are_plain_attention_to_the_bit() -> None:
    parts = drawn()
    assert torch.equal(
        core()(*parts, None, packed_seq_params=PackedDocuments.of(numbered([[S]] * B), CPU)), core()(*parts, None)
    )


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_pieces_of_a_cut_row_see_their_own_documents(data: st.DataObject) -> None:
    cp = data.draw(st.sampled_from((1, 2, 4)))
    ends = data.draw(st.lists(st.sets(st.integers(1, S - 1)), min_size=1, max_size=3))
    rows = [[b - a for a, b in zip([0, *sorted(row)], [*sorted(row), S], strict=True)] for row in ends]
    documents = numbered(rows)
    size = S if cp == 1 else S // (2 * cp)
    for rank in range(cp):
        packed = PackedDocuments.of(documents, CPU, cp=cp, cp_index=rank)
        for place, chunk in zip(sequence_chunks(cp, rank), packed.chunks, strict=True):
            start, seen = place * size, []
            assert chunk.stop == start + size
            for row, parts in zip(documents.tolist(), chunk.rows, strict=True):
                key, query = parts.first_key, start
                for num_queries, num_keys in zip(parts.queries, parts.keys, strict=True):
                    key, query = key + num_keys, query + num_queries
                    # The last of each is the same place, and the keys begin where the document does.
                    assert key == query and len(set(row[key - num_keys : key])) == 1
                    assert key == num_keys or row[key - num_keys - 1] != row[key - num_keys]
                    seen.append((num_queries, num_keys))
                assert query == start + size
            assert chunk.query_offsets.diff().tolist() == [queries for queries, _ in seen]
            assert chunk.key_offsets.diff().tolist() == [keys for _, keys in seen]
            assert (chunk.most_queries, chunk.most_keys) == tuple(map(max, zip(*seen, strict=True)))
            assert chunk.is_plain == all(row[0] == row[start + size - 1] for row in documents.tolist())


def by_offsets(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor, *lengths: int
) -> Tensor:
    """What flash attention makes of flat tensors: in each document the last query sees the last key."""
    made = []
    for q, k, v in zip(
        *(x.split(o.diff().tolist()) for x, o in ((query, query_offsets), (key, key_offsets), (value, key_offsets))),
        strict=True,
    ):
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        made.append(
            nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE, enable_gqa=True)[0]
        )
    assert lengths == (query_offsets.diff().max(), key_offsets.diff().max())
    assert query_offsets.dtype == key_offsets.dtype == torch.int32
    return torch.cat(made, dim=1).transpose(0, 1)


@pytest.mark.parametrize("cp", [1, 2])
def test_flash_attention_gets_all_documents_in_one_call(cp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def flash(*given: Any, scale: float) -> tuple[Tensor]:
        calls.append((*given[7:], scale))
        return (by_offsets(*given[:7]),)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    (query, key, value), documents = drawn(), numbered(ROWS)
    want = masked(query, key, value, documents)
    for rank in range(cp):
        for chunk in PackedDocuments.of(documents, CPU, cp=cp, cp_index=rank).chunks:
            at = slice(chunk.stop - S // (2 * cp if cp > 1 else 1), chunk.stop)
            got = subject.all_at_once(query[at], key, value, chunk, SCALE)
            torch.testing.assert_close(got, want[at], atol=2e-6, rtol=0)
    # No dropout, causal, no mask to look at.
    assert calls == [(0.0, True, False, SCALE)] * (1 if cp == 1 else 2 * cp)


def test_transformer_engine_gets_flat_documents_and_whole_rows_as_before() -> None:
    class Theirs(nn.Module):
        """Megatron's TEDotProductAttention."""

        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, mask: None, attn_mask_type: str = "", *,
            packed_seq_params: Any = None, attention_bias: None = None,
        ) -> Tensor:  # fmt: skip
            assert mask is None and attn_mask_type == "causal"
            if packed_seq_params is None:
                return query.flatten(2)
            thd = packed_seq_params
            assert thd.qkv_format == "thd" and query.shape == (S * B, HEADS, WIDTH) and query.is_contiguous()
            offsets = thd.cu_seqlens_q, thd.cu_seqlens_kv, thd.max_seqlen_q, thd.max_seqlen_kv
            return by_offsets(query, key, value, *offsets).flatten(1)

    parts, documents = drawn(), numbered(ROWS)
    attention = subject.by_transformer_engine(Theirs)()
    packed = PackedDocuments.of(documents, CPU)
    got = attention(*parts, None, attn_mask_type="causal", attention_bias=None, packed_seq_params=packed)
    torch.testing.assert_close(got, masked(*parts, documents), atol=2e-6, rtol=0)
    whole = attention(*parts, None, attn_mask_type="causal", attention_bias=None, packed_seq_params=None)
    assert torch.equal(whole, parts[0].flatten(2))


def test_a_packed_model_is_that_of_each_document_alone_and_no_other_has_an_influence() -> None:
    (found,) = run_ranks(1, _one_model)
    assert found["gradient at other documents"] == 0.0 and found["logits of other documents"] == 0.0
    assert found["moved itself"] > 0.1 and found["influence without a mask"] > 1e-3
    assert found["logits alone"] < 1e-6 and found["gradients alone"] < 2e-6, found


def _one_model(environment: Environment) -> dict[str, float]:
    from gpt4moe.model.gpt import build_model
    from tests.distributed.case import BASE
    from tests.moe.case import rank_groups, relative

    run = load_run_config([*BASE, f"model.seq_length={S}", "model.moe.router.load_balancing_coefficient=0",
                           "model.moe.router.z_loss_coefficient=0"])  # fmt: skip
    with rank_groups(environment) as groups:
        (chunk,) = build_model(run, groups)
        weights = list(chunk.parameters())
        tokens = torch.randint(0, run.model.vocab_size, (B, S), generator=torch.Generator().manual_seed(7))
        documents = numbered(ROWS)

        def logits(tokens: Tensor, documents: Tensor | None) -> Tensor:
            packed = {} if documents is None else {"packed_seq_params": PackedDocuments.of(documents, CPU)}
            whole: Tensor = chunk(tokens, torch.zeros_like(tokens), None, **packed)
            return whole

        embedded: list[Tensor] = []
        hook = chunk.embedding.register_forward_hook(lambda module, given, made: embedded.append(made))
        packed = logits(tokens, documents)
        own = documents == 1  # of the first and the third row
        (at,) = torch.autograd.grad((packed.square() * own.unsqueeze(2)).sum(), embedded, retain_graph=True)
        hook.remove()
        changed = torch.where(own, (tokens + 1) % run.model.vocab_size, tokens)
        moved = (logits(changed, documents) - packed).abs().amax(dim=2)
        without = (logits(changed, None) - logits(tokens, None)).abs().amax(dim=2)

        alone, pieces = torch.zeros_like(packed), []
        for row in range(B):
            for number in range(len(ROWS[row])):
                place = documents[row] == number
                piece = logits(tokens[row : row + 1, place], None)
                alone[row, place] = piece[0].detach()
                pieces.append(piece)
        both = [
            torch.autograd.grad(sum(part.square().sum() for part in parts), weights) for parts in ([packed], pieces)
        ]
        return {
            "gradient at other documents": at.transpose(0, 1)[~own].abs().max().item(),
            "logits of other documents": moved[~own].max().item(),
            "moved itself": moved[own].max().item(),
            "influence without a mask": without[documents > 1].max().item(),
            "logits alone": relative(packed.detach(), alone),
            "gradients alone": max(relative(ours, theirs) for ours, theirs in zip(*both, strict=True)),
        }


def test_positions_are_those_within_a_document() -> None:
    assert places_in_documents(numbered([[2, 3]])).tolist() == [[0, 1, 0, 1, 2]]
