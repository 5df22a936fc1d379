"""Triton's kernels of rotary.Rotary, one each way. Triton is imported here, so only where they are chosen.

A program has the heads of one group of one token: R queries, and with KEY_VALUE their key and value. It reads and
writes each element once and turns in fp32.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _split(  # type: ignore[no-untyped-def]
    mixed, query, key, value, table, batch, length, queries, half,
    KEY_VALUE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row, heads = tl.program_id(0).to(tl.int64), queries + 2 * KEY_VALUE
    group = row * tl.num_programs(1) + tl.program_id(1)
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside, turns = (head < heads) & (at < half), head <= queries
    place = mixed + (group * heads + head) * 2 * half + at
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    angle = table + row // batch * half + at
    cos = tl.load(angle, mask=at < half, other=0.0)
    sin = tl.load(angle + length * half, mask=at < half, other=0.0)
    turned = tl.where(turns, first * cos - second * sin, first).to(query.dtype.element_ty)
    beside = tl.where(turns, second * cos + first * sin, second).to(query.dtype.element_ty)
    out = query + (group * queries + head) * 2 * half + at
    tl.store(out, turned, mask=inside & (head < queries))
    tl.store(out + half, beside, mask=inside & (head < queries))
    if KEY_VALUE:
        out = key + group * 2 * half + at + 0 * head
        tl.store(out, turned, mask=inside & (head == queries))
        tl.store(out + half, beside, mask=inside & (head == queries))
        out = value + group * 2 * half + at + 0 * head
        tl.store(out, turned, mask=inside & (head == queries + 1))
        tl.store(out + half, beside, mask=inside & (head == queries + 1))


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    query, key, value, mixed, table, batch, length, queries, half,
    query_s, query_b, query_n, key_s, key_b, key_n, value_s, value_b, value_n,
    KEY_VALUE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row, group, heads = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), queries + 2 * KEY_VALUE
    s, b = row // batch, row % batch
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside, turns = (head < heads) & (at < half), head <= queries
    place = query + s * query_s + b * query_b + (group * queries + head) * query_n + at
    first = tl.load(place, mask=inside & (head < queries), other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=inside & (head < queries), other=0.0).to(tl.float32)
    if KEY_VALUE:
        place = key + s * key_s + b * key_b + group * key_n + at + 0 * head
        first += tl.load(place, mask=inside & (head == queries), other=0.0).to(tl.float32)
        second += tl.load(place + half, mask=inside & (head == queries), other=0.0).to(tl.float32)
        place = value + s * value_s + b * value_b + group * value_n + at + 0 * head
        first += tl.load(place, mask=inside & (head == queries + 1), other=0.0).to(tl.float32)
        second += tl.load(place + half, mask=inside & (head == queries + 1), other=0.0).to(tl.float32)
    angle = table + s * half + at
    cos = tl.load(angle, mask=at < half, other=0.0)
    sin = tl.load(angle + length * half, mask=at < half, other=0.0)
    back = tl.where(turns, first * cos + second * sin, first)
    beside = tl.where(turns, second * cos - first * sin, second)
    out = mixed + ((row * tl.num_programs(1) + group) * heads + head) * 2 * half + at
    tl.store(out, back.to(mixed.dtype.element_ty), mask=inside)
    tl.store(out + half, beside.to(mixed.dtype.element_ty), mask=inside)


def split(mixed: Tensor, table: Tensor, query: Tensor, key: Tensor | None, value: Tensor | None) -> None:
    """mixed [S, B, G, R + 2, D], or [S, B, G, R, D] without key and value; table [2, S, D/2] fp32 -> query
    [S, B, G * R, D], key and value [S, B, G, D]; all contiguous."""
    if not mixed.numel():
        return
    length, batch, groups, heads, width = mixed.shape
    has_key = key is not None
    _split[(length * batch, groups)](
        mixed, query, query if key is None else key, query if value is None else value, table, batch, length,
        heads - 2 * has_key, width // 2, KEY_VALUE=has_key, HEADS=triton.next_power_of_2(heads),
        HALF=triton.next_power_of_2(width // 2),
    )  # fmt: skip


def join(query: Tensor, key: Tensor | None, value: Tensor | None, table: Tensor, mixed: Tensor) -> None:
    """The gradients of split's outputs -> mixed's. Theirs may have any strides but the last, which is 1; the rest is
    contiguous."""
    if not mixed.numel():
        return
    length, batch, groups, heads, width = mixed.shape
    has_key = key is not None
    key, value = query if key is None else key, query if value is None else value
    strides = [stride for tensor in (query, key, value) for stride in tensor.stride()[:3]]
    _join[(length * batch, groups)](
        query, key, value, mixed, table, batch, length, heads - 2 * has_key, width // 2, *strides,
        KEY_VALUE=has_key, HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(width // 2),
    )  # fmt: skip
