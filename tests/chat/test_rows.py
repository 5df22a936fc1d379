"""Chat lines of three forms become the same messages; what cannot be learned from is refused with its place."""

from typing import Any

import pytest

from gpt4moe.chat.rows import conversation_of
from gpt4moe.errors import DataError

ASKED = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED},
        {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
        {"instruction": "1+1?", "input": "", "output": "2"},
    ],
)
def test_three_forms_of_a_line_are_one_conversation(row: dict[str, Any]) -> None:
    assert conversation_of(row, "f:1").messages == ASKED


def test_alpaca_s_input_follows_its_instruction_and_a_system_text_comes_first() -> None:
    row = {"instruction": "Add.", "input": "1, 1", "output": "2", "system": "Be short."}
    assert [(m["role"], m["content"]) for m in conversation_of(row, "f:1").messages] == [
        ("system", "Be short."), ("user", "Add.\n\n1, 1"), ("assistant", "2"),
    ]  # fmt: skip


def test_tools_and_several_turns_are_in_order_and_a_weight_of_0_is_not_learned() -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    row = {
        "tools": [{"type": "function", "function": {"name": "add"}}],
        "messages": [
            {"role": "system", "content": "s"}, {"role": "user", "content": "u"},
            {"role": "assistant", "content": None, "tool_calls": calls, "weight": 0},
            {"role": "tool", "content": "2"}, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "5"},
        ],
    }  # fmt: skip
    assert conversation_of(row, "f:1").learned == [False, True]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ([], "no JSON object"),
        ({"text": "x"}, "neither messages nor conversations"),
        ({"messages": "x"}, "no list of objects"),
        ({"messages": []}, "is empty"),
        ({"messages": [ASKED[1]]}, "message 0: roles out of order: assistant is the first"),
        ({"messages": [ASKED[0], ASKED[0], ASKED[1]]}, "message 1: roles out of order: user follows user"),
        ({"messages": [*ASKED, {"role": "system", "content": "s"}]}, "system follows assistant"),
        ({"messages": [{"role": "robot", "content": "s"}]}, "the role 'robot'"),
        ({"messages": [ASKED[0]]}, "ends with user"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": 2}]}, "message 1: its content is a number"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": None}]}, "its content is missing"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": [{"type": "text"}]}]}, "its content is a list"),
        ({"messages": [ASKED[0], {**ASKED[1], "weight": 0}]}, "has weight 0"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": ""}]}, "would learn to say nothing"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": " \n"}]}, "would learn to say nothing"),
        ({"messages": [ASKED[0], {**ASKED[1], "tool_calls": {"a": 1}}]}, "message 1: its tool_calls is no list"),
        ({"messages": [ASKED[0], {"role": "assistant", "tool_calls": ["add"]}]}, "its tool_calls is no list"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": ["x"]},
            "system is",
        ),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "has a history"),
        ({"messages": [ASKED[0], {**ASKED[1], "weight": 0.5}]}, "weight is 0.5"),
        ({"messages": ASKED, "tools": "add"}, "tools is a text"),
        ({"conversations": [{"from": "martian", "value": "x"}]}, "from 'martian'"),
        ({"instruction": 1, "output": "2"}, "instruction is a number"),
        ({"instruction": "x"}, "no output"),
    ],
)
def test_a_bad_line_is_refused_with_its_file_and_number(row: Any, told: str) -> None:
    with pytest.raises(DataError) as raised:
        conversation_of(row, "chat.jsonl:7")
    assert raised.value.cause.startswith("chat.jsonl:7") and told in raised.value.cause and raised.value.cure
