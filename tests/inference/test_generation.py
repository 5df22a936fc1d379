"""Generation with a cache: the same greedy tokens and logits on every layout as one process without a cache, for every
kind of model; rows that join and leave; ranks without prompts."""

from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from gpt4moe.architecture.cache import rank_cache_bytes
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import ConfigError, DataError
from gpt4moe.inference.cache import BLOCK_TOKENS, KeyValueCache, block_bytes, blocks_of, layer_bytes
from gpt4moe.inference.generation import Generator
from gpt4moe.inference.requests import Limits, Request
from gpt4moe.inference.sampling import Sampling
from gpt4moe.inference.stages import _attended, through_layer
from gpt4moe.model.parameters import decoder_layers
from gpt4moe.model.rotary import FusedRotaryAttention
from gpt4moe.parallel.groups import ProcessGroups
from tests.inference.cases import LAYOUTS, MODELS, NEW_TOKENS, greedy, prompts, walk, without_cache, write
from tests.spawn import run_ranks

CLOSE = 1e-4
"""fp32 sums in another order; logits are up to 10."""
CASES = [("top2", layout) for layout in LAYOUTS] + [
    (model, layout) for model in MODELS if model != "top2" for layout in ("pp2-vpp2", "tp2-ep2-etp2")
]


def _of_layout(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> tuple[list[tuple[Any, ...]], Any, int, int]:
    """(texts), (logits that this rank drew from), number and count of copies."""
    found = write(chunks, run, groups, greedy(prompts()))
    logits = {key: values.numpy() for key, values in found.logits.items()}
    assert all(chunk.training for chunk in chunks) and torch.is_grad_enabled(), "chunks were left in evaluation"
    texts = [(text.tokens, text.logprobs, text.finish_reason) for text in found.texts]
    if groups.layout.ep * groups.layout.etp > groups.layout.tp:  # copies step together
        alone = write(chunks, run, groups, greedy(prompts()[:1], 3)).texts  # other copies have no prompt
        assert alone[0].tokens == texts[0][0][:3]
    return texts, logits, groups.dp_cp.rank(), groups.dp_cp.size()


def _in_one_process(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> list[tuple[list[int], np.ndarray]]:
    if run.model.moe is not None:
        run.model.moe.router.capacity_factor = None  # generation drops nothing
    (chunk,) = chunks
    _assert_layers_are_megatron_s(chunk.eval())
    found = [without_cache(chunk.eval(), prompt) for prompt in prompts()]
    return [(tokens, logits.numpy()) for tokens, logits in found]


@torch.no_grad()
def _assert_layers_are_megatron_s(chunk: Any) -> None:
    hidden = torch.randn(7, 1, chunk.config.hidden_size, generator=torch.Generator().manual_seed(1))
    for layer in chunk.decoder.layers:
        whole = layer(hidden, attention_mask=None, packed_seq_params=None)[0]
        assert torch.equal(through_layer(layer, hidden, None, None), whole), "a layer does more than this"
        hidden = whole


@cache
def one_process() -> dict[str, list[tuple[list[int], np.ndarray]]]:
    (found,) = run_ranks(1, walk, [(model, "one") for model in MODELS], _in_one_process)
    return dict(zip(MODELS, found, strict=True))


@cache
def four_ranks() -> dict[tuple[str, str], list[Any]]:
    """Of each case what each rank found; the ranks start once."""
    answers = run_ranks(4, walk, CASES, _of_layout, timeout_seconds=600)
    return {case: [answer[at] for answer in answers] for at, case in enumerate(CASES)}


@pytest.mark.timeout(700)  # the first case starts the ranks and walks through all of them
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_tokens_and_logits_are_those_of_one_process_without_a_cache(case: tuple[str, str]) -> None:
    wanted, seen = one_process()[case[0]], 0
    for texts, logits, copy, num_copies in four_ranks()[case]:
        assert [tokens for tokens, _, _ in texts] == [tokens for tokens, _ in wanted]  # on every rank
        assert {reason for _, _, reason in texts} == {"length"}
        for (number, position), values in logits.items():
            request = copy + num_copies * number
            at = position - len(prompts()[request])
            np.testing.assert_allclose(values, wanted[request][1][at], atol=CLOSE)
            logprob = torch.log_softmax(torch.from_numpy(wanted[request][1][at]), -1)[texts[request][0][at]]
            assert abs(texts[request][1][at] - logprob) < CLOSE
            seen += 1
    assert seen == NEW_TOKENS * len(prompts())  # each token was drawn on one rank


def test_eight_ranks_say_the_same() -> None:
    case = ("sigmoid bias, shared experts", "8 ranks")
    for ((texts, _, _, num_copies),) in run_ranks(8, walk, [case], _of_layout):
        assert num_copies == 2
        assert [tokens for tokens, _, _ in texts] == [tokens for tokens, _ in one_process()[case[0]]]


@pytest.mark.parametrize("model", MODELS)
def test_the_texts_vary(model: str) -> None:
    assert len({token for tokens, _ in one_process()[model] for token in tokens}) > 10


def _batches(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> dict[str, list[Any]]:
    """Texts with few rows at once, and with prompts in small pieces."""
    requests = greedy(prompts((5, 17, 1, 33, 16, 40, 3, 20)))
    limits = {"all": Limits(), "rows": Limits(max_rows=3), "pieces": Limits(max_rows=2, max_step_tokens=7)}
    return {name: [text.tokens for text in write(chunks, run, groups, requests, limit).texts]
            for name, limit in limits.items()}  # fmt: skip


def test_rows_that_join_later_and_prompts_in_pieces_change_no_text() -> None:
    (((found),),) = (run_ranks(1, walk, [("top2", "one")], _batches),)
    (texts,) = found
    assert texts["rows"] == texts["all"] and texts["pieces"] == texts["all"]
    assert len({tuple(tokens) for tokens in texts["all"]}) == 8


def _cached(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> dict[str, Any]:
    """Of all texts at once and of the longest alone: texts, bytes of the cache, what the planner's formula says, the
    most that a step gathered, and what was allowed."""
    requests, found = greedy(prompts()), {}
    blocks = sorted((blocks_of(len(one.prompt) + one.max_tokens - 1) for one in requests), reverse=True)
    bytes_of, of_layer = block_bytes(run.model, run.parallel, 4), layer_bytes(run.model, run.parallel, 4)
    for name, count, rows in (("all", sum(blocks), len(blocks)), ("few", blocks[0], 1)):
        gathered = of_layer * blocks[0] * rows
        generator = Generator(chunks, run, groups, limits=Limits(cache_bytes=count * bytes_of + gathered))
        seen = gathered_bytes(generator.cache)
        texts = [text.tokens for text in generator.generate_all(requests)]
        layers = [index for chunk in chunks for index in decoder_layers(chunk)]
        most = rank_cache_bytes(run.model, layers, num_tokens=count * BLOCK_TOKENS, tp=groups.layout.tp, value_bytes=4)
        found[name] = (texts, generator.cache.memory_bytes, most, max(seen), gathered)
    alone = blocks[0] * (bytes_of + of_layer)
    with pytest.raises(ConfigError, match=f"needs {alone:,} bytes of cache"):
        write(chunks, run, groups, requests, Limits(cache_bytes=alone - 1))
    return found


def gathered_bytes(cache: KeyValueCache) -> list[int]:
    """Grows by the bytes of each tensor that the cache makes to be read."""
    found: list[int] = []
    read = cache.read

    def noted(*arguments: Any) -> tuple[Tensor, Tensor]:
        key, value = read(*arguments)
        assert key.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
        found.append(key.untyped_storage().nbytes())
        return key, value

    cache.read = noted  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_the_cache_is_as_large_as_the_planner_s_formula_says_and_is_refused_beforehand(layout: str) -> None:
    for (found,) in run_ranks(1 if layout == "one" else 2, walk, [("top2", layout)], _cached):
        texts, used, most, gathered, allowed = found["all"]
        assert 0 < used <= most and 0 < gathered <= allowed
        few, used, most, gathered, allowed = found["few"]
        assert used == most and gathered == allowed and few == texts  # rows wait for each other's blocks


def _ends(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> Any:
    (whole,) = write(chunks, run, groups, greedy(prompts()[:1])).texts
    end = whole.tokens[4]
    request = Request(prompt=prompts()[0], max_tokens=9, sampling=Sampling(temperature=0), end_ids=frozenset({end}))
    generator = Generator(chunks, run, groups)
    ended, stopped, penalised = generator.generate_all([
        request,
        Request(prompt=prompts()[0], max_tokens=9, sampling=Sampling(temperature=0),
                is_stopped=lambda new: len(new) == 3),
        Request(prompt=prompts()[0], max_tokens=9, sampling=Sampling(temperature=0, repetition_penalty=1e9)),
    ])  # fmt: skip
    return whole.tokens, ended, stopped, [*prompts()[0], *penalised.tokens]


def test_a_text_ends_before_its_end_token_and_after_a_stop_and_repeats_nothing_that_is_penalised() -> None:
    ((found,),) = run_ranks(1, walk, [("top2", "one")], _ends)
    whole, ended, stopped, penalised = found
    assert len(set(penalised[-9:])) == 9 and not set(penalised[-9:]) & set(penalised[:-9])
    assert ended.tokens == whole[: whole.index(whole[4])] and ended.finish_reason == "stop"
    assert stopped.tokens == whole[:3] and stopped.finish_reason == "stop"
    assert len(ended.logprobs) == len(ended.tokens)


def _not_finite(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> str:
    with torch.no_grad():
        next(chunks[-1].parameters()).fill_(float("nan"))
    with pytest.raises(DataError) as refusal:
        Generator(chunks, run, groups).generate_all(greedy(prompts()))
    return refusal.value.cause


def test_logits_that_are_no_numbers_draw_no_token_on_any_rank() -> None:
    for cause in run_ranks(2, walk, [("top2", "tp2")], _not_finite):
        assert "logits are NaN" in cause[0]


def _arrivals(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> Any:
    """Texts of requests that arrive before steps 0, 3 and 40, after all others have ended; rows of each step."""
    requests, calls, together = greedy(prompts()), [], []
    arrive = {0: requests[:1], 3: requests[1:4], 40: requests[4:]}

    def arrivals(is_idle: bool) -> list[Request] | None:
        calls.append(is_idle)
        return arrive.get(len(calls) - 1, []) if len(calls) < 60 else None

    generator = Generator(chunks, run, groups, watch=lambda rows, logits: together.append(len(rows)))
    joined = {done.number: done.tokens for done in generator.generate([], arrivals)}
    return joined, [text.tokens for text in write(chunks, run, groups, requests).texts], together, calls


@pytest.mark.parametrize("layout", ["one", "pp2"])
def test_requests_that_arrive_join_the_running_batch_and_change_no_text(layout: str) -> None:
    for ((joined, texts, together, calls),) in run_ranks(
        1 if layout == "one" else 2, walk, [("top2", layout)], _arrivals
    ):
        assert [joined[number] for number in range(5)] == texts
        assert max(together, default=4) == 4  # only one rank draws tokens
        assert len(calls) == 60 and calls[20] and not calls[4]


@pytest.mark.parametrize("kind", [SelfAttention, FusedRotaryAttention])
def test_a_step_leaves_out_what_only_training_has_in_the_attention_of_gpus_too(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = kind.__new__(kind)
    nn.Module.__init__(module)
    monkeypatch.setattr(SelfAttention, "get_query_key_value_tensors", lambda self, hidden: 3 * (hidden,))
    module.config = SimpleNamespace(qk_layernorm=True)
    module.core_attention = lambda query, key, value, mask, packed_seq_params: query + key + value
    module.linear_proj = lambda attended: (2 * attended, None)
    assert torch.equal(_attended(module, torch.ones(2), cast(Any, "a step")), torch.full((2,), 6.0))
