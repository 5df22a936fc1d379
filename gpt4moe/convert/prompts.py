"""A file of prompts, one a line -> token ids. No torch."""

from pathlib import Path

import tokenizers

from gpt4moe.convert.model_files import tokenizer_files
from gpt4moe.convert.verify import open_weights
from gpt4moe.convert.weights import CheckpointWeights
from gpt4moe.errors import ConversionError


def read_prompts(file: Path, folders: list[Path]) -> list[list[int]]:
    """Encoded with the first tokenizer.json that a folder (or the run of a checkpoint) has; a file of numbers is taken
    as token ids where none has one.

    Raises: ConversionError when the file is empty or cannot be encoded.
    """
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{file} cannot be read ({error}).", "Give a text file in UTF-8.") from error
    texts = [text for text in map(_tokenizer_text, folders) if text is not None]
    if texts:
        try:
            tokenizer = tokenizers.Tokenizer.from_str(texts[0])
        except Exception as error:  # what the library raises
            raise ConversionError(f"tokenizer.json cannot be read ({error}).", "Copy it again.") from error
        prompts = [tokenizer.encode(line, add_special_tokens=False).ids for line in lines]
    else:
        if not all(word.isascii() and word.isdigit() and len(word) < 19 for line in lines for word in line.split()):
            raise ConversionError(
                "No folder has a tokenizer, and the prompts are no token ids.", "Give lines of numbers: 17 4 201."
            )
        prompts = [[int(word) for word in line.split()] for line in lines]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ConversionError(f"{file} has no prompts.", "Write one a line.")
    vocabulary = min(open_weights(folder).model.vocab_size for folder in folders)
    largest = max(map(max, prompts))
    if largest >= vocabulary:
        raise ConversionError(
            f"{file} has token {largest}; the smaller vocabulary has {vocabulary} tokens.",
            f"Give ids below {vocabulary}.",
        )
    return prompts


def _tokenizer_text(folder: Path) -> str | None:
    if (folder / "config.json").exists():
        path = folder / "tokenizer.json"
        return path.read_text(encoding="utf-8") if path.exists() else None
    source = CheckpointWeights(folder)
    files, _ = tokenizer_files(source.folder, source.index.manifest, source.run, None)
    content = files.get("tokenizer.json")
    return None if content is None else content.decode()
