"""Bodies of the API: every field is read, or refused by name."""

from typing import Any

import pytest
import tokenizers

from gpt4moe.inference.sight import Sight
from gpt4moe.inference.text import Words
from gpt4moe.serving.bad_request import BadRequest
from gpt4moe.serving.fields import read_body

TOKENIZER = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 1, "b": 2, "c": 3, "big": 99}, unk_token="a"))
TOKENIZER.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # type: ignore[assignment]
TEMPLATE = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}" \
           "{{ m.content }} {% endfor %}"  # fmt: skip
WORDS = Words(
    backend=TOKENIZER, end_ids=frozenset({0}), vocab_size=10, context_length=8, chat_template=TEMPLATE
)  # fmt: skip


def blind(words: Words) -> Sight:
    return Sight(words, None, "<image>", None)


SIGHT = blind(WORDS)


def read(is_chat: bool = False, **fields: Any) -> Any:
    start = {"messages": [{"role": "user", "content": "a b"}]} if is_chat else {"prompt": "a b"}
    return read_body({"model": "m", **start, **fields}, SIGHT, is_chat=is_chat, model="m")


def test_prompts_are_texts_or_tokens_one_or_several() -> None:
    cases: list[tuple[Any, list[list[int]]]] = [
        ("a b", [[1, 2]]), ([3, 4], [[3, 4]]), (["a", "b c"], [[1], [2, 3]]), ([[1], [2, 2]], [[1], [2, 2]]),
        ("", [[0]]),
    ]  # fmt: skip
    for prompt, wanted in cases:
        assert [one.prompt for one in read(prompt=prompt).wanted] == wanted
    both = read(prompt=["a", "b"], n=2, stop="x", seed=5, max_tokens=3)
    assert [(one.prompt, one.sample) for one in both.wanted] == [([1], 0), ([1], 1), ([2], 0), ([2], 1)]
    assert {(one.stops, one.sampling.seed, one.max_tokens) for one in both.wanted} == {(("x",), 5, 3)}


def test_what_is_left_out_is_as_in_the_reference() -> None:
    (one,) = read(temperature=None).wanted
    assert (one.sampling.temperature, one.sampling.top_p, one.max_tokens) == (1.0, 1.0, 6)  # 16, but the context is 8
    assert read().wanted[0].sampling.seed != read().wanted[0].sampling.seed
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "c"}]
    (chat,) = read(True, messages=[{"role": "user", "content": parts}], max_completion_tokens=2).wanted
    assert chat.prompt == [1, 3] and chat.max_tokens == 2


def test_fields_that_ask_for_nothing_are_taken() -> None:
    assert len(read(presence_penalty=0, logit_bias={}, echo=False, best_of=1, user="me").wanted) == 1
    assert len(read(True, tools=[], response_format={"type": "text"}, top_logprobs=0).wanted) == 1


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("is_chat", "fields", "field", "status"),
    [
        (False, {"model": None}, "model", 400), (False, {"model": "other"}, "model", 404),
        (False, {"temperature": -1}, "temperature", 400), (False, {"temperature": True}, "temperature", 400),
        (False, {"temperature": float("nan")}, "temperature", 400),
        (False, {"temperature": 10**400}, "temperature", 400),
        (False, {"top_p": 0}, "top_p", 400),
        (False, {"n": 0}, "n", 400), (False, {"n": 129}, "n", 400), (False, {"prompt": ["a"] * 70, "n": 2}, "n", 400),
        (False, {"max_tokens": 0}, "max_tokens", 400), (False, {"max_tokens": 7}, "max_tokens", 400),
        (False, {"prompt": "a " * 8}, "prompt", 400), (False, {"prompt": "big"}, "prompt", 400),
        (False, {"prompt": [-1]}, "prompt", 400), (False, {"prompt": [10]}, "prompt", 400),
        (False, {"prompt": []}, "prompt", 400), (False, {"prompt": [[]]}, "prompt", 400),
        (False, {"prompt": {"a": 1}}, "prompt", 400), (False, {"prompt": None}, "prompt", 400),
        (False, {"logprobs": 3}, "logprobs", 400), (False, {"stop": ""}, "stop", 400),
        (False, {"stop": [1]}, "stop", 400),
        (False, {"stream": 1}, "stream", 400), (False, {"stream_options": {}}, "stream_options", 400),
        (False, {"stream": True, "stream_options": {"x": 1}}, "stream_options", 400),
        (False, {"echo": True}, "echo", 400), (False, {"logit_bias": {"1": 2}}, "logit_bias", 400),
        (False, {"presence_penalty": 0.5}, "presence_penalty", 400), (False, {"best_of": 2}, "best_of", 400),
        (False, {"suffix": "x"}, "suffix", 400), (False, {"tempratur": 1}, "tempratur", 400),
        (False, {"messages": [USER]}, "messages", 400), (False, {"seed": 1.5}, "seed", 400),
        (True, {"prompt": "a"}, "prompt", 400), (True, {"messages": []}, "messages", 400),
        (True, {"messages": ["a"]}, "messages[0]", 400),
        (True, {"messages": [{"role": "user"}]}, "messages[0].content", 400),
        (True, {"messages": [{"role": "system", "content": "a"}]}, "messages", 400),
        (True, {"messages": [{**USER, "tool_calls": []}]}, "messages[0].tool_calls", 400),
        (True, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content", 400),
        (True, {"tools": [{"type": "function"}]}, "tools", 400), (True, {"logprobs": 0}, "logprobs", 400),
        (True, {"response_format": {"type": "json_object"}}, "response_format", 400),
        (True, {"top_logprobs": 2}, "top_logprobs", 400),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(is_chat: bool, fields: dict[str, Any], field: str, status: int) -> None:
    with pytest.raises(BadRequest) as refused:
        read(is_chat, **fields)
    assert (refused.value.field, refused.value.status) == (field, status), refused.value.message


def test_a_body_that_is_no_object_and_a_model_without_a_template_are_refused() -> None:
    with pytest.raises(BadRequest, match="no JSON object"):
        read_body([1], SIGHT, is_chat=False, model="m")
    bare = Words(backend=TOKENIZER, end_ids=frozenset(), vocab_size=10, context_length=8)
    with pytest.raises(BadRequest, match="no chat template"):
        read_body({"model": "m", "messages": [USER]}, blind(bare), is_chat=True, model="m")
    with pytest.raises(BadRequest, match="is empty"):
        read_body({"model": "m", "prompt": ""}, blind(bare), is_chat=False, model="m")
