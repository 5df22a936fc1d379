"""A tokenizer with its chat template, as files of Hugging Face: what transformers and tools/generate.py --chat read.

tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json, chat_template.jinja

A data folder of conversations has them in TOKENIZER_FOLDER, and a step folder that was made from Hugging Face too.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from gpt4moe.chat.template import DEFAULT_TEMPLATE, ChatTemplate
from gpt4moe.data.manifest import write_json
from gpt4moe.data.tokenizer import END_TOKENS, Tokenizer, eos_of, load_backend, vocabulary_size
from gpt4moe.errors import DataError

TOKENIZER_FOLDER = "tokenizer"
TEMPLATE_FILE = "chat_template.jinja"
_GENERATION = "generation_config.json"
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", _GENERATION, TEMPLATE_FILE)
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, slots=True)
class ChatWords:
    """What turns messages into tokens."""

    backend: tokenizers.Tokenizer
    """Special tokens in a text are read as such: contents must not have them."""
    template: ChatTemplate
    eos_id: int
    path: Path
    """tokenizer.json"""
    settings: dict[str, Any]
    """tokenizer_config.json"""
    generation: dict[str, Any]
    """generation_config.json"""

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.backend, vocabulary_size(self.backend), self.eos_id)

    def write(self, folder: Path, ends: Iterable[int] = ()) -> None:
        """All files, the template last. What is there already stays, but for what ends a text.

        Args:
            ends: tokens that the assistant learns to end its turns with, beside those of generation_config.json.
        """
        folder.mkdir(exist_ok=True)
        is_whole = (folder / TEMPLATE_FILE).is_file()
        generation = (read_json(folder / _GENERATION) if is_whole else {}) or self.generation
        before = generation.get("eos_token_id")
        known = before if isinstance(before, list) else [] if before is None else [before]
        more = sorted(set(ends) - set(known))
        if more:
            generation = generation | {"eos_token_id": [*known, *more]}
        if is_whole:
            write_json(folder / _GENERATION, generation)
            return
        names = dict(self.template.special)
        settings = {key: value for key, value in self.settings.items() if key != "chat_template"}
        contents = {
            "tokenizer.json": self.path.read_text(encoding="utf-8"), "tokenizer_config.json": _json(settings),
            "special_tokens_map.json": _json(names), _GENERATION: _json(generation),
            TEMPLATE_FILE: self.template.source,
        }  # fmt: skip
        for name in _FILES:
            (folder / name).write_text(contents[name], encoding="utf-8")


def read_words(path: Path, template_file: Path | None = None) -> ChatWords:
    """Of a Hugging Face folder, or of a tokenizer.json with an end-of-text token, which gets DEFAULT_TEMPLATE.

    Args:
        template_file: a template in place of the folder's.
    Raises: DataError when a file is missing or damaged, and for a folder without a template or an end token;
        ConfigError for a template that is no jinja.
    """
    folder = path if path.is_dir() else path.parent
    file = path / "tokenizer.json" if path.is_dir() else path
    backend = load_backend(file)
    backend.encode_special_tokens = False
    is_whole = path.is_dir() and (folder / "tokenizer_config.json").is_file()
    settings = read_json(folder / "tokenizer_config.json") if is_whole else _own_settings(backend)
    special = special_texts(settings)
    end = dict(special).get("eos_token")
    eos_id = eos_of(backend) if end is None else backend.token_to_id(end)
    if eos_id is None:
        wanted = f"token {end}" if end else f"token of {', '.join(END_TOKENS)}"
        raise DataError(f"{file} has no {wanted}, which would end a text.", "Name a tokenizer that has one.")
    source = template_of(folder, settings) if is_whole else DEFAULT_TEMPLATE
    if template_file is not None:
        if not template_file.is_file():
            raise DataError(f"{template_file} is missing.", "Name a file with a jinja template.")
        source = template_file.read_text(encoding="utf-8")
    if source is None:
        raise DataError(f"{folder} has no chat template.", "Name one with --template FILE.jinja.")
    generation = read_json(folder / _GENERATION) if is_whole else {}
    ends = {"bos_token_id": _id(backend, special, "bos_token"), "eos_token_id": eos_id,
            "pad_token_id": _id(backend, special, "pad_token")}  # fmt: skip
    template = ChatTemplate(source, special)
    template.require_jinja()
    return ChatWords(backend, template, eos_id, file, settings, ends | generation)


def template_of(folder: Path, settings: dict[str, Any]) -> str | None:
    """The chat template of a Hugging Face folder, the default one of several; None: it has none."""
    file, template = folder / TEMPLATE_FILE, settings.get("chat_template")
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if isinstance(template, list):  # several by name
        template = next((one["template"] for one in template if one.get("name") == "default"), None)
    return template


def special_texts(settings: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Names and texts of the special tokens that a template may use."""
    return tuple((name, content(settings[name])) for name in _SPECIAL if settings.get(name) is not None)


def content(token: Any) -> str:
    """The text of a token of tokenizer_config.json."""
    return str(token["content"] if isinstance(token, dict) else token)


def read_json(path: Path) -> dict[str, Any]:
    """Of an optional file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no JSON ({error}).", "Copy or download the folder again.") from error
    return found if isinstance(found, dict) else {}


def _own_settings(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json of a tokenizer.json that stands alone."""
    eos_id = eos_of(backend)
    end = {} if eos_id is None else dict.fromkeys(("eos_token", "pad_token"), backend.id_to_token(eos_id))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", **end, "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }  # fmt: skip


def _id(backend: tokenizers.Tokenizer, special: tuple[tuple[str, str], ...], name: str) -> int | None:
    text = dict(special).get(name)
    return None if text is None else backend.token_to_id(text)


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
