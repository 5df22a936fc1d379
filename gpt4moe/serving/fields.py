"""Bodies of /v1/completions and /v1/chat/completions -> what to generate. Every field is read or refused by name.

The reference is OpenAI's API; `top_k`, `min_p` and `repetition_penalty` have vLLM's names (extra_body of the client).
"""

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpt4moe.errors import ConfigError
from gpt4moe.inference.sampling import Sampling
from gpt4moe.inference.sight import Sight
from gpt4moe.inference.text import Words
from gpt4moe.serving.bad_request import BadRequest
from gpt4moe.serving.desk import Wanted
from gpt4moe.serving.messages import read_chat

MOST_TEXTS, MOST_STOPS = 128, 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A checked body."""

    is_chat: bool
    wanted: list[Wanted]
    """num_samples texts of the first prompt, then of the second."""
    num_prompts: int
    is_streamed: bool
    has_usage: bool
    """Whether the stream ends with the counts of tokens."""
    has_logprobs: bool


Check = Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    # A whole number may be larger than every float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


READ: dict[str, tuple[Check, str]] = {
    "temperature": (lambda v: _is_number(v) and 0 <= v <= 2, "a number from 0 to 2"),
    "top_p": (lambda v: _is_number(v) and 0 < v <= 1, "a number above 0, at most 1"),
    "top_k": (lambda v: _is_integer(v) and -1 <= v < 2**31, "a whole number; 0 or -1: all tokens"),
    "min_p": (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda v: _is_number(v) and 0 < v <= 100, "a number above 0"),
    "seed": (lambda v: _is_integer(v) and -(2**63) <= v < 2**63, "a whole number of 64 bits"),
    "n": (lambda v: _is_integer(v) and 1 <= v <= MOST_TEXTS, f"a whole number from 1 to {MOST_TEXTS}"),
    "max_tokens": (lambda v: _is_integer(v) and v >= 1, "a whole number, 1 or more"),
    "max_completion_tokens": (lambda v: _is_integer(v) and v >= 1, "a whole number, 1 or more"),
    "stream": (lambda v: isinstance(v, bool), "true or false"),
    "stream_options": (
        lambda v: isinstance(v, dict) and v in ({}, {"include_usage": True}, {"include_usage": False}),
        'an object of "include_usage" alone',
    ),
    "stop": (
        lambda v: (isinstance(v, str) and v != "")
        or (isinstance(v, list) and len(v) <= MOST_STOPS and all(isinstance(one, str) and one for one in v)),
        f"a text, or a list of at most {MOST_STOPS} texts, none empty",
    ),
    "model": (lambda v: isinstance(v, str), "a text"),
    "user": (lambda v: isinstance(v, str), "a text"),
}  # fmt: skip
"""Fields of both forms, what they may be, and how that is said. null is a field that is left out."""
BOTH = set(READ) - {"max_completion_tokens"}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "metadata": ({},), "store": (False,),
    "echo": (False,), "best_of": (1,), "suffix": ("",), "top_logprobs": (0,), "tools": ([],), "tool_choice": ("none",),
    "functions": ([],), "function_call": ("none",), "response_format": ({"type": "text"},), "modalities": (["text"],),
    "parallel_tool_calls": (True, False), "service_tier": ("auto", "default"),
}  # fmt: skip
"""Fields that are not supported, with the values that ask for nothing."""


def read_body(body: Any, sight: Sight, *, is_chat: bool, model: str) -> Question:
    """Raises: BadRequest that names the field."""
    if not isinstance(body, dict):
        raise BadRequest("The body is no JSON object.")
    given = {name: value for name, value in body.items() if value is not None}
    _require_known(given, is_chat)
    if "model" not in given:
        raise BadRequest(f"The field 'model' is missing; this server has {model!r}.", "model")
    if given["model"] != model:
        raise BadRequest(
            f"There is no model {given['model']!r} here, only {model!r}.", "model", status=404, code="model_not_found"
        )
    words = sight.words
    chat, images = read_chat(given, sight) if is_chat else ([], ())
    prompts = [chat] if is_chat else [_imageless(prompt, sight) for prompt in _prompts(given, words)]
    count = given.get("n", 1)
    if len(prompts) * count > MOST_TEXTS:
        raise BadRequest(f"{len(prompts)} prompts x n={count} are more than {MOST_TEXTS} texts.", "n")
    stop = given.get("stop", [])
    wanted = [
        Wanted(
            prompt=prompt, max_tokens=_max_tokens(given, len(prompt), words.context_length, is_chat=is_chat),
            sampling=_sampling(given), sample=sample, stops=(stop,) if isinstance(stop, str) else tuple(stop),
            images=images,
        )
        for prompt in prompts
        for sample in range(count)
    ]  # fmt: skip
    is_streamed = given.get("stream", False)
    if "stream_options" in given and not is_streamed:
        raise BadRequest("'stream_options' needs stream=true.", "stream_options")
    logprobs = given.get("logprobs", False)
    return Question(
        is_chat=is_chat, wanted=wanted, num_prompts=len(prompts), is_streamed=is_streamed,
        has_usage=given.get("stream_options", {}).get("include_usage", False),
        has_logprobs=logprobs if is_chat else logprobs is not False,
    )  # fmt: skip


def _require_known(given: dict[str, Any], is_chat: bool) -> None:
    own = BOTH | ({"messages", "max_completion_tokens", "logprobs"} if is_chat else {"prompt", "logprobs"})
    for name, value in given.items():
        if name in NEUTRAL:
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in NEUTRAL[name]):
                raise BadRequest(f"The field {name!r} is not supported by this server. Leave it out.", name)
        elif name not in own:
            raise BadRequest(f"The field {name!r} is not known here. Leave it out.", name)
        elif name in READ and not READ[name][0](value):
            raise BadRequest(f"{name!r} must be {READ[name][1]}, not {_shown(value)}.", name)
    logprobs = given.get("logprobs", False)
    if is_chat and not isinstance(logprobs, bool):
        raise BadRequest(f"'logprobs' must be true or false, not {_shown(logprobs)}.", "logprobs")
    if not is_chat and logprobs is not False and (not _is_integer(logprobs) or logprobs != 0):
        raise BadRequest("'logprobs' must be 0: other tokens' log-probabilities are not supported.", "logprobs")


def _sampling(given: dict[str, Any]) -> Sampling:
    return Sampling(
        temperature=given.get("temperature", 1.0), top_k=max(0, given.get("top_k", 0)), top_p=given.get("top_p", 1.0),
        min_p=given.get("min_p", 0.0), repetition_penalty=given.get("repetition_penalty", 1.0),
        seed=given["seed"] if "seed" in given else secrets.randbelow(2**31),
    )  # fmt: skip


def _max_tokens(given: dict[str, Any], num_prompt: int, context: int, *, is_chat: bool) -> int:
    left = context - num_prompt
    name = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    if name not in given:
        return left if is_chat else min(16, left)
    if given[name] > left:
        raise BadRequest(
            f"The prompt has {num_prompt} tokens and {name} is {given[name]}, but the context is {context}. "
            f"Set {name} to {left} or less, or shorten the prompt.",
            name, code="context_length_exceeded",
        )  # fmt: skip
    return int(given[name])


def _prompts(given: dict[str, Any], words: Words) -> list[list[int]]:
    prompt = given.get("prompt")
    is_tokens = isinstance(prompt, list) and bool(prompt) and all(map(_is_integer, prompt))
    several = prompt if isinstance(prompt, list) and not is_tokens else [prompt]
    if not several:
        raise BadRequest("'prompt' is an empty list.", "prompt")
    return [_prompt(one, words) for one in several]


def _prompt(prompt: Any, words: Words) -> list[int]:
    try:
        if isinstance(prompt, str):
            return words.encode(prompt)
        if not isinstance(prompt, list) or not prompt or not all(map(_is_integer, prompt)):
            raise BadRequest("'prompt' must be a text, a list of token ids, or a list of these.", "prompt")
        if min(prompt) < 0:
            raise BadRequest(f"'prompt' has the token {min(prompt)}, which is below 0.", "prompt")
        return words.checked(prompt, _shown(prompt))
    except ConfigError as error:
        raise BadRequest(f"{error.cause} {error.cure}", "prompt") from error


def _imageless(prompt: list[int], sight: Sight) -> list[int]:
    if any(token in sight.banned for token in prompt):
        raise BadRequest("'prompt' has an image token, which needs an image: use /v1/chat/completions.", "prompt")
    return prompt


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
