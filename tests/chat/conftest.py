"""A byte-level tokenizer of ours and one with ChatML's tokens, each with its template."""

from pathlib import Path

import pytest
import tokenizers

from gpt4moe.chat.words import ChatWords, read_words
from gpt4moe.data.tokenizer import train_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "GEN{{ message['content'] + '<|im_end|>' }}END{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = CHATML.replace("GEN", "").replace("END", "")
BLOCKS = CHATML.replace("GEN", "{% if message['role'] == 'assistant' %}{% generation %}").replace(
    "END",
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}",
)


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> ChatWords:
    path = tmp_path_factory.mktemp("own") / "tokenizer.json"
    texts = [f"word{i} and other_{i % 7} things, 12 + {i}?\n" for i in range(200)]
    train_tokenizer(texts, vocab_size=300).backend.save(str(path))
    return read_words(path)


@pytest.fixture(scope="session")
def hugging_face(own: ChatWords, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Hugging Face: ChatML, without blocks."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    own.write(folder)
    backend = tokenizers.Tokenizer.from_file(str(own.path))
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(PLAIN)
    return folder
