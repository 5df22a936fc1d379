"""Text with images as tokens: one token stands for each image, and no text can forge it.

    "A cat <image> and a dog <image>" --split_tags--> ["A cat ", None, " and a dog ", None] --encode_parts--> tokens

Training and generation cut and encode text with the same two functions.
"""

import json
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt4moe.data.tokenizer import END_TOKENS, Tokenizer, load_backend
from gpt4moe.errors import DataError

IMAGE_TOKEN = "<image>"


class AddedToken(str, Enum):
    """Where a tokenizer gets an image token. grow: a number after its last one, so a model needs one entry more.
    replace: the number of its last merge, which texts are then written without; a model keeps its size."""

    grow = "grow"
    replace = "replace"  # type: ignore[assignment]  # str has a method of this name


def split_tags(text: str, token: str = IMAGE_TOKEN) -> list[str | None]:
    """Texts, and None where an image stands. Empty texts are left out."""
    found: list[str | None] = []
    for number, part in enumerate(text.split(token)):
        found += [None] if number else []
        found += [part] if part else []
    return found


def encode_parts(tokenizer: Tokenizer, parts: Sequence[str | None], image_id: int) -> NDArray[np.int64]:
    """Tokens of texts, each encoded by itself, with image_id for None. A text is read as text alone: no EOS, and an
    image token that is written out in it becomes plain letters."""
    texts = iter(tokenizer.encode_batch([part for part in parts if part is not None]))
    tokens = [token for part in parts for token in ([image_id] if part is None else next(texts))]
    return np.array(tokens, dtype=np.int64)


def image_id_of(tokenizer: Tokenizer, path: Path, token: str = IMAGE_TOKEN) -> int:
    """Raises: DataError when the tokenizer has no such special token, or it is one that ends texts."""
    if token in END_TOKENS or tokenizer.backend.token_to_id(token) == tokenizer.eos_id:
        raise DataError(
            f"--image-token {token}: {token} ends texts, so it cannot stand for an image.",
            f"Name another special token, or leave the option out for {IMAGE_TOKEN}.",
        )
    added = tokenizer.backend.get_added_tokens_decoder()
    for number, one in added.items():
        if one.content == token and one.special:
            return int(number)
    is_plain = tokenizer.backend.token_to_id(token) is not None
    raise DataError(
        f"{path} has {'the token ' + token + ', but not as a special one' if is_plain else 'no token ' + token}: "
        "nothing stands for an image.",
        "Name another special token of it that no text uses (--image-token), or ask for one to be added: "
        "--add-image-token replace keeps the size of the vocabulary, grow makes it one larger.",
    )


def add_image_token(path: Path, out: Path, how: AddedToken, token: str = IMAGE_TOKEN) -> None:
    """Writes `path`, a tokenizer.json, with the special token to `out`.

    Raises: DataError when it has the token, or, for replace, when its last entry is not the product of its last merge.
    """
    backend = load_backend(path)
    if backend.token_to_id(token) is not None:
        raise DataError(f"{path} has the token {token} already.", "Leave --add-image-token out.")
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = backend.get_vocab(with_added_tokens=True)
    number = max(vocabulary.values()) + 1
    if how is AddedToken.replace:
        number -= 1
        _take_out(content, number, path)
    content["added_tokens"].append(
        {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
    )  # fmt: skip
    out.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    if load_backend(out).token_to_id(token) != number:
        out.unlink()
        raise DataError(f"{path} has numbers that no token has: {token} would not get {number}.", "Add it by hand.")


def _take_out(content: dict[str, Any], number: int, path: Path) -> None:
    """The last entry of a BPE and its merge. Raises: DataError."""
    model = content["model"]
    merges = model.get("merges") or []
    merged = "" if not merges else "".join(merges[-1] if isinstance(merges[-1], list) else merges[-1].split(" "))
    if model.get("type") != "BPE" or model["vocab"].get(merged) != number:
        raise DataError(
            f"The last entry of {path}, number {number}, is not what its last merge makes, so it cannot be replaced.",
            "Use --add-image-token grow, or --image-token with a special token that it has.",
        )
    merges.pop()
    del model["vocab"][merged]
