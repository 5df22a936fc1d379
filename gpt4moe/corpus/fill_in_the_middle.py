"""Fill-in-the-middle for code: a share of the documents is cut in three, and the middle comes last.

    PSM   <pre> prefix <suf> suffix <mid> middle
    SPM   <pre> <suf> suffix <mid> prefix middle        (the paper's joint form)

Bavarian et al., arXiv:2207.14255, at document level and by characters. Which documents, and where they are cut, is a
function of the seed and the document's bytes: the same for any order of files, processes or pieces.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from gpt4moe.data.tokenizer import Tokenizer
from gpt4moe.errors import DataError

KNOWN_TOKENS = (
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
    ("<PRE>", "<MID>", "<SUF>"),
)
"""Prefix, middle, suffix: looked for in this order where no names are given."""


@dataclass(frozen=True, slots=True)
class FillInTheMiddle:
    """
    Args:
        rate: share of documents.
        spm_share: of those, the share in SPM form.
        tokens: ids of prefix, middle, suffix.
    """

    rate: float
    spm_share: float
    seed: int
    tokens: tuple[int, int, int]

    def parts(self, text: str, data: bytes) -> list[int | bytes] | None:
        """Ids of special tokens and texts, in the order of the document's tokens; None: it stays as it is."""
        digest = hashlib.blake2b(data, digest_size=32, key=self.seed.to_bytes(8, "big")).digest()
        is_chosen, is_spm, first, second = (int.from_bytes(digest[8 * i : 8 * i + 8], "big") for i in range(4))
        if is_chosen >= self.rate * 2.0**64:
            return None
        low, high = sorted((first % (len(text) + 1), second % (len(text) + 1)))
        prefix, middle, suffix = (part.encode() for part in (text[:low], text[low:high], text[high:]))
        pre, mid, suf = self.tokens
        if is_spm < self.spm_share * 2.0**64:
            return [pre, suf, suffix, mid, prefix + middle]
        return [pre, prefix, suf, suffix, mid, middle]


def token_ids(tokenizer: Tokenizer, names: Sequence[str] | None) -> tuple[int, int, int]:
    """Of prefix, middle, suffix. Raises: DataError where the tokenizer has none of these names."""
    for triple in [names] if names is not None else KNOWN_TOKENS:
        ids = [found for name in triple if (found := tokenizer.backend.token_to_id(name)) is not None]
        if len({*ids}) == 3:
            return ids[0], ids[1], ids[2]
    wanted = ", ".join(names) if names is not None else " or ".join(", ".join(triple) for triple in KNOWN_TOKENS)
    raise DataError(
        f"Fill-in-the-middle needs three special tokens, and the tokenizer has not {wanted}.",
        "Name its own with --fim-tokens PREFIX,MIDDLE,SUFFIX, or train one: --train-tokenizer adds them with --fim.",
    )
