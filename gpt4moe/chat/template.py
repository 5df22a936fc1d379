"""A chat template: jinja with the names that transformers' apply_chat_template has. It says where its assistant speaks.

    with {% generation %} blocks   what stands in them
    without                        rendered turn by turn: what an answer adds to the prompt that asks for it

Both are checked: a template whose assistant's parts cannot be found is refused, never guessed.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2.sandbox
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from gpt4moe.errors import ConfigError, DataError

DEFAULT_TEMPLATE = (
    "{% if tools %}{{ 'tools' + eos_token + (tools | tojson) + eos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'assistant' + eos_token }}"
    "{% generation %}{% if message['content'] %}{{ message['content'] }}{% endif %}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['role'] + eos_token + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' + eos_token }}{% endif %}"
)
"""For tokenizers without one: a role and its content, each ended by the end-of-text token. No text can forge that
token, and no other token reaches over it, so an answer's tokens are the same in training and behind a prompt."""
Span = tuple[int, int]
"""Characters from, to (not included)."""
_START, _END = "\0<generation>\0", "\0<endgeneration>\0"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """One template, with the special tokens that it may name."""

    source: str
    special: tuple[tuple[str, str], ...] = ()
    """Names and texts: bos_token, eos_token, ..."""

    @property
    def has_blocks(self) -> bool:
        """Whether it marks what the assistant says itself."""
        return _START in _compiled(self.source)[1]

    def require_jinja(self) -> None:
        """Raises: ConfigError for a template with a mistake in its syntax."""
        try:
            _compiled(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"The chat template is no jinja: {error.message}, in its line {error.lineno}.", "Mend the template."
            ) from error

    def render(
        self, messages: Sequence[dict[str, Any]], *, tools: list[Any] | None = None, is_prompt: bool = True
    ) -> str:
        """Messages as text.

        Args:
            is_prompt: the assistant is asked to go on.
        Raises: ConfigError when the template refuses the messages.
        """
        return self._marked(messages, tools, is_prompt=is_prompt).replace(_START, "").replace(_END, "")

    def spans(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None, where: str) -> tuple[str, list[Span]]:
        """The text of a whole conversation, and for each of the assistant's messages where it stands.

        Raises: DataError when they cannot be found; ConfigError as render.
        """
        found = self._blocks(messages, tools) if self.has_blocks else self._turns(messages, tools)
        text, spans = found
        expected = sum(message["role"] == "assistant" for message in messages)
        if len(spans) != expected or any(start >= end for start, end in spans):
            raise DataError(
                f"{where}: the chat template shows {len(spans)} of {expected} assistant's parts.",
                "Put {% generation %} and {% endgeneration %} around what the assistant says, its end token included.",
            )
        return text, spans

    def _blocks(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None) -> tuple[str, list[Span]]:
        before, *parts = self._marked(messages, tools, is_prompt=False).split(_START)
        spans: list[Span] = []
        for part in parts:
            said, end, rest = part.partition(_END)
            if end:
                # Blocks that touch are of one turn: its text, and behind the loop the end of the whole (Phi-3).
                first = spans.pop()[0] if spans and spans[-1][1] == len(before) else len(before)
                spans.append((first, len(before) + len(said)))
            before += said + rest
        return before, spans

    def _turns(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None) -> tuple[str, list[Span]]:
        """Parts that are not found are left out."""
        whole, spans = self.render(messages, tools=tools, is_prompt=False), []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self.render(messages[:number], tools=tools)
            answered = self.render(messages[: number + 1], tools=tools, is_prompt=False)
            # A template may drop or change earlier turns; then no stretch of the whole text is this answer.
            if answered.startswith(asked) and whole.startswith(answered):
                spans.append((len(asked), len(answered)))
        return whole, spans

    def _marked(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None, *, is_prompt: bool) -> str:
        try:
            template = _compiled(self.source)[0]
            return str(
                template.render(messages=messages, tools=tools, add_generation_prompt=is_prompt, **dict(self.special))
            )
        except Exception as error:  # a template is a program: it may divide by zero
            raise ConfigError(
                f"The chat template does not take these messages: {error or type(error).__name__}.",
                'Give lines {"messages": [{"role": "user", "content": "..."}]} as the template expects them.',
            ) from error


class _Generation(Extension):
    """The tag of transformers' templates around what the assistant says; here it writes marks."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it without ClassVar

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.Output([nodes.TemplateData(_START)]), *body, nodes.Output([nodes.TemplateData(_END)])]


@lru_cache(maxsize=8)
def _compiled(source: str) -> tuple[jinja2.Template, str]:
    """The template, and its own texts."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    environment.filters["tojson"] = lambda value, **rest: json.dumps(value, ensure_ascii=False, **rest)
    texts = environment.parse(source).find_all(nodes.TemplateData)
    return environment.from_string(source), "".join(text.data for text in texts)
