"""Tokens and masks are those of transformers; without {% generation %} they are found turn by turn, or refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import processors

from gpt4moe.chat.encode import Encoder
from gpt4moe.chat.rows import Conversation, conversation_of
from gpt4moe.chat.template import ChatTemplate
from gpt4moe.chat.words import ChatWords, read_words
from gpt4moe.errors import ConfigError, DataError
from tests.chat.conftest import BLOCKS, PLAIN

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "word1 and 12?"},
                  {"role": "assistant", "content": "things"}, {"role": "user", "content": "ünd\n\n was"},
                  {"role": "assistant", "content": "\N{SNOWMAN} 14"}]},
    {"messages": [{"role": "user", "content": "  call"}, {"role": "assistant", "content": "add"},
                  {"role": "tool", "content": "3"}, {"role": "assistant", "content": "three"}]},
]  # fmt: skip


def encoded(words: ChatWords, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    found = Encoder(words).encode(conversation_of(row, "f:1"), "f:1")
    return found.tokens.tolist(), found.mask.astype(int).tolist()


def of_transformers(folder: Path, row: dict[str, Any], template: str) -> tuple[list[int], list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenizer.apply_chat_template(
        row["messages"], chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], found["assistant_masks"]


@pytest.mark.parametrize("row", ROWS)
def test_tokens_and_mask_are_those_of_transformers(
    own: ChatWords, hugging_face: Path, tmp_path: Path, row: dict[str, Any]
) -> None:
    own.write(tmp_path / "own")
    assert encoded(own, row) == of_transformers(tmp_path / "own", row, own.template.source)
    blocks = tmp_path / "blocks.jinja"
    blocks.write_text(BLOCKS)
    want = of_transformers(hugging_face, row, BLOCKS)
    assert encoded(read_words(hugging_face, blocks), row) == want and 0 < sum(want[1]) < len(want[1])
    assert encoded(read_words(hugging_face), row) == want, "found turn by turn"


def test_what_is_learned_is_the_answer_and_its_end_and_stands_behind_the_prompt_s_tokens(own: ChatWords) -> None:
    tokens, mask = encoded(own, ROWS[0])
    learned = [token for token, is_learned in zip(tokens, mask, strict=True) if is_learned]
    assert own.tokenizer.decode(learned) == "things<|endoftext|>\N{SNOWMAN} 14<|endoftext|>"
    prompt = own.template.render(ROWS[0]["messages"][:2])
    ids = own.backend.encode(prompt, add_special_tokens=False).ids
    assert tokens[: len(ids)] == ids and not any(mask[: len(ids)]) and mask[len(ids)]


def test_weights_choose_among_answers(own: ChatWords) -> None:
    row = {"messages": [dict(message) for message in ROWS[0]["messages"]]}
    row["messages"][2]["weight"] = 0
    tokens, mask = encoded(own, row)
    learned = [token for token, is_learned in zip(tokens, mask, strict=True) if is_learned]
    assert own.tokenizer.decode(learned) == "\N{SNOWMAN} 14<|endoftext|>"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        # Earlier answers are dropped once there is another turn, as some templates do with thoughts.
        (PLAIN.replace("{% for message in messages %}", "{% for message in messages[-2:] %}"), "0 of 2 assistant's"),
        (PLAIN.replace("assistant\n'", "assistant\nso '"), "0 of 2 assistant's parts"),
        ("{% generation %}{{ messages[-1]['content'] + '<|im_end|>' }}{% endgeneration %}", "1 of 2 assistant's parts"),
        (PLAIN.replace("+ '<|im_end|>'", "+ '|'").replace("<|im_start|>", "~"), "no end token"),
        ("{{ raise_exception('only tools') }}", "only tools"),
    ],
)
def test_a_template_whose_answers_cannot_be_found_is_refused(
    hugging_face: Path, tmp_path: Path, template: str, told: str
) -> None:
    (tmp_path / "t.jinja").write_text(template)
    with pytest.raises((DataError, ConfigError), match=told):
        encoded(read_words(hugging_face, tmp_path / "t.jinja"), ROWS[0])


def test_a_token_over_the_border_and_a_special_token_in_a_content_are_refused(hugging_face: Path) -> None:
    words = read_words(hugging_face)
    asked = {"role": "user", "content": "x"}
    with pytest.raises(DataError, match="half the assistant's"):
        answer = {"role": "assistant", "content": "ord1"}
        joined = ChatTemplate(PLAIN.replace("assistant\n'", "assistant\nw'").replace("+ '\n' }}", "+ '\nw' }}"))
        other = ChatWords(words.backend, joined, words.eos_id, words.path, words.settings, words.generation)
        encoded(other, {"messages": [asked, answer]})
    with pytest.raises(DataError, match=r"message 0: its content has <\|im_end\|>"):
        encoded(
            words, {"messages": [{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "b"}]}
        )


def test_a_folder_without_a_template_or_an_end_token_is_refused(
    hugging_face: Path, own: ChatWords, tmp_path: Path
) -> None:
    own.write(tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="no chat template"):
        read_words(tmp_path / "bare")
    with pytest.raises(DataError, match="is missing"):
        read_words(hugging_face, tmp_path / "none.jinja")
    (tmp_path / "bare" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(DataError, match="no token </s>"):
        read_words(tmp_path / "bare", hugging_face / "chat_template.jinja")


def _changed(folder: Path, tmp_path: Path, template: str, change: Callable[[tokenizers.Tokenizer], object]) -> Encoder:
    """An encoder of a copy of the folder, with another template and a tokenizer that `change` has had."""
    new = tmp_path / "changed"
    shutil.copytree(folder, new)
    backend = tokenizers.Tokenizer.from_file(str(new / "tokenizer.json"))
    change(backend)
    backend.save(str(new / "tokenizer.json"))
    (new / "chat_template.jinja").write_text(template)
    return Encoder(read_words(new))


def _of(answer: str) -> Conversation:
    return Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}])


def test_a_token_within_an_answer_is_no_end_of_it(hugging_face: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}{% endfor %}" \
               "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"  # fmt: skip
    encoder = _changed(hugging_face, tmp_path, template, lambda backend: backend.add_tokens(["</think>"]))
    for answer in ("</think>word</think>12 and 3", "word</think>"):
        with pytest.raises(DataError, match="no end token stands at the end"):
            encoder.encode(_of(answer), "f:1")


def test_a_token_over_the_border_is_seen_where_the_tokenizer_tells_places_without_blanks(
    hugging_face: Path, tmp_path: Path
) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}" \
               "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"  # fmt: skip

    def trim(backend: tokenizers.Tokenizer) -> None:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)

    encoder = _changed(hugging_face, tmp_path, template, trim)
    with pytest.raises(DataError, match="is half the assistant's and half not"):
        encoder.encode(_of("and 12"), "f:1")


def test_no_text_of_tools_or_calls_forges_a_token(own: ChatWords) -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"x": "<|endoftext|>user<|endoftext|>"}}}]
    for conversation in (
        Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": calls}]),
        Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], calls),
    ):
        with pytest.raises(DataError, match="which would be read as the token"):
            Encoder(own).encode(conversation, "f:1")


NAMES = "start_of_turn|end_of_turn|end_of_utterance|bos|eos|s|/s"
TRL_SPECIAL = re.compile(rf"<\|[^|<>]+\|>|<(?:{NAMES})>|<\|?turn\|?>|<\uff5c[^<>]+\uff5c>")
OF_TRL = (
    "cohere2", "deepseekv3", "diffusion_gemma", "gemma3", "glm4moe", "gptoss", "idefics3", "lfm2_v2", "llama3",
    "nemotron_3_nano", "phi3", "qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_6",
)  # fmt: skip
TURN_BY_TURN = ("cohere2", "gemma3", "lfm2_v2", "qwen2_5", "qwen3_instruct_2507")
"""Templates without blocks that keep every earlier turn."""


@pytest.mark.parametrize("name", OF_TRL)
def test_masks_are_those_of_trl_s_training_templates(own: ChatWords, tmp_path: Path, name: str) -> None:
    trl = pytest.importorskip("trl", reason="no trl here")
    templates = Path(trl.__file__).parent / "chat_templates"
    plain, training = (templates / f"{name}{part}.jinja" for part in ("", "_training"))
    own.write(tmp_path / "hf")
    backend = tokenizers.Tokenizer.from_file(str(own.path))
    backend.add_special_tokens(sorted(set(TRL_SPECIAL.findall(plain.read_text()))))
    backend.save(str(tmp_path / "hf" / "tokenizer.json"))
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|endoftext|>"}))
    tokens, mask = of_transformers(tmp_path / "hf", ROWS[0], training.read_text())
    assert encoded(read_words(tmp_path / "hf", training), ROWS[0]) == (tokens, mask)
    if name in TURN_BY_TURN:
        ours = encoded(read_words(tmp_path / "hf", plain), ROWS[0])
        more = {tokens[at] for at, (a, b) in enumerate(zip(ours[1], mask, strict=True)) if a != b}
        assert ours[0] == tokens and more <= {backend.token_to_id("Ċ")}, "TRL learns line breaks around an answer too"
