"""A small data folder that tests of several rooms read."""

from pathlib import Path

from gpt4moe.data.preprocess import SourceText, write_data_folder
from gpt4moe.data.tokenizer import train_tokenizer

VOCABULARY = 300


def numbered_lines(folder: Path) -> Path:
    """Writes one source of 200 numbered lines and its tokenizer of VOCABULARY into `folder`."""
    texts = [f"word {i} and {i * i} other things\n" for i in range(200)]
    train_tokenizer(texts, vocab_size=VOCABULARY).backend.save(str(folder / "tokenizer.json"))
    source = SourceText(train=texts, valid=texts[:20], licence="CC0-1.0", description="numbered lines")
    write_data_folder(folder, {"alpha": source}, folder / "tokenizer.json", lambda amount: None)
    return folder
