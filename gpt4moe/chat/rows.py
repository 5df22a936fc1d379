"""Chat lines -> messages, checked: roles in order, contents of the right type. Three forms of a line:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "tools": [...]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}         ShareGPT
    {"instruction": "...", "input": "...", "output": "...", "system": "..."}                        Alpaca

A message of the assistant with "weight": 0 is read but not learned, as in OpenAI's format.
"""

from dataclasses import dataclass
from typing import Any

from gpt4moe.errors import DataError

ASSISTANT = "assistant"
_AFTER = {
    None: ("system", "user"), "system": ("user",), "user": (ASSISTANT,), ASSISTANT: ("user", "tool"),
    "tool": (ASSISTANT, "tool"),
}  # fmt: skip
"""Role -> which may follow. None: the beginning."""
_SHAREGPT = {
    "system": "system", "human": "user", "user": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "assistant": ASSISTANT,
    "function_call": ASSISTANT, "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_FORMS = 'Write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}.'


@dataclass(frozen=True, slots=True)
class Conversation:
    """One line."""

    messages: list[dict[str, Any]]
    """With role and content; an assistant's may have tool_calls, and then no content."""
    tools: list[Any] | None = None
    """Descriptions of tools, for the template."""

    @property
    def learned(self) -> list[bool]:
        """For each message of the assistant, whether it is learned."""
        return [message.get("weight", 1) != 0 for message in self.messages if message["role"] == ASSISTANT]


def conversation_of(row: Any, where: str) -> Conversation:
    """A line's conversation.

    Args:
        where: file and line, for errors.
    Raises: DataError for another form, roles out of order, a content of a wrong type, and no turn of the assistant to
        learn from.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where} is no JSON object.", _FORMS)
    if "messages" in row:
        messages = _listed(row["messages"], where, "messages")
    elif "conversations" in row:
        messages = [_from_sharegpt(turn, where) for turn in _listed(row["conversations"], where, "conversations")]
        if not isinstance(row.get("system") or "", str):
            raise DataError(f"{where}: system is {_type(row['system'])}.", "Give a text.")
        if row.get("system"):
            messages.insert(0, {"role": "system", "content": row["system"]})
    elif "instruction" in row:
        messages = _from_alpaca(row, where)
    else:
        raise DataError(f"{where} has neither messages nor conversations nor instruction.", _FORMS)
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where}: tools is {_type(tools)}.", "Give a list of tools, or leave it out.")
    found = Conversation(messages, tools or None)
    _check(found, where)
    return found


def _check(conversation: Conversation, where: str) -> None:
    before = None
    for number, message in enumerate(conversation.messages):
        role, at = message.get("role"), f"{where}, message {number}"
        if not isinstance(role, str) or role not in _AFTER:
            raise DataError(f"{at} has the role {role!r}.", "Choose of: system, user, assistant, tool.")
        if role not in _AFTER[before]:
            place = f"follows {before}" if before else "is the first"
            raise DataError(
                f"{at}: roles out of order: {role} {place}.",
                f"Here may come: {', '.join(_AFTER[before])}. Mend the line, or --bad-rows skip.",
            )
        calls = message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise DataError(f"{at}: its tool_calls is no list of objects.", "Give a list of calls, or leave it out.")
        may_lack = role == ASSISTANT and calls
        if not isinstance(message.get("content"), str) and not (message.get("content") is None and may_lack):
            raise DataError(
                f"{at}: its content is {_type(message.get('content'))}.", "Give a text; null only beside tool_calls."
            )
        if role == ASSISTANT and not (message.get("content") or "").strip() and not calls and message.get("weight", 1):
            raise DataError(f"{at}: its content is empty: the model would learn to say nothing.",
                            'Leave the line out, set "weight": 0, or --bad-rows skip.')  # fmt: skip
        if message.get("weight", 1) not in (0, 1):
            raise DataError(f"{at}: its weight is {message['weight']!r}.", "Give 0 or 1, or leave it out.")
        before = role
    if before != ASSISTANT:
        last = f"ends with {before}" if before else "is empty"
        raise DataError(
            f"{where}: the conversation {last}: there is no assistant's turn after it to learn.",
            "End it with the assistant's turn, or --bad-rows skip.",
        )
    if not any(conversation.learned):
        raise DataError(
            f"{where}: every turn of the assistant has weight 0.", "Leave the line out, or --bad-rows skip."
        )


def _listed(value: Any, where: str, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise DataError(f"{where}: {name} is no list of objects.", _FORMS)
    return [dict(one) for one in value]


def _from_sharegpt(turn: dict[str, Any], where: str) -> dict[str, Any]:
    role = turn.get("from")
    if not isinstance(role, str) or role not in _SHAREGPT:
        raise DataError(f"{where}: a turn is from {role!r}.", f"Choose of: {', '.join(_SHAREGPT)}.")
    weight = {"weight": turn["weight"]} if "weight" in turn else {}
    return {"role": _SHAREGPT[role], "content": turn.get("value"), **weight}


def _from_alpaca(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    for name in ("instruction", "input", "output", "system"):
        value = row.get(name, "")
        if not isinstance(value, str) and not (value is None and name in ("input", "system")):
            raise DataError(f"{where}: {name} is {_type(value)}.", "Give a text.")
    if row.get("history"):
        raise DataError(f"{where} has a history, which would be lost.", _FORMS)
    if "output" not in row:
        raise DataError(f"{where} has an instruction and no output.", "Give the answer as output.")
    asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    first = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*first, {"role": "user", "content": asked}, {"role": ASSISTANT, "content": row["output"]}]


def _type(value: Any) -> str:
    names = {type(None): "missing", list: "a list", dict: "an object", bool: "a truth value", str: "a text"}
    return names.get(type(value), "a number")
