"""Tokenizers of other libraries as a tokenizer.json: sentencepiece's .model, tiktoken's files of ranks.

Each is converted once, and must then give the same ids as its own library for the corpus's sample: a conversion that is
almost right is worse than none.
"""

import base64
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from gpt4moe.corpus.encoder import HARD
from gpt4moe.data.tokenizer import EOS_TOKEN
from gpt4moe.errors import DataError

_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "r50k": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": _CL100K, "o200k": _O200K,
}  # fmt: skip
"""How tiktoken's encodings split text into words (tiktoken 0.14, tiktoken_ext/openai_public.py). A file of ranks does
not say; its name does, or --tiktoken-split."""
_END_OF_TEXT = {"r50k": 50256, "cl100k": 100257, "o200k": 199999}

Ids = Callable[[str], Sequence[int]]


def is_foreign(path: Path) -> bool:
    return path.suffix in (".model", ".tiktoken")


def convert(path: Path, to: Path, sample: Sequence[str], *, split: str | None = None) -> None:
    """Writes a tokenizer.json.

    Args:
        sample: texts of the corpus, for which its own library must give the same ids.
        split: of SPLITS, for a tiktoken file whose name does not say.
    Raises: DataError for a file of another kind, and where the ids differ.
    """
    if not path.is_file():
        raise DataError(f"The tokenizer {path} is missing.", "Name a tokenizer.json, .model or .tiktoken file.")
    package = "sentencepiece" if path.suffix == ".model" else "tiktoken"
    if find_spec(package) is None or (package == "sentencepiece" and find_spec("transformers") is None):
        raise DataError(f"{path} needs the package {package}.", f"pip install {package} (requirements.txt).")
    backend, ids = _sentencepiece(path) if package == "sentencepiece" else _tiktoken(path, split)
    backend.encode_special_tokens = True
    for text in (*HARD, *sample):
        ours, theirs = backend.encode(text, add_special_tokens=False).ids, list(ids(text))
        if ours != theirs:
            at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
            raise DataError(
                f"{path}: converted, the tokenizer gives other ids than {package} for {text[:60]!r} (from token {at} "
                f"on: {ours[at : at + 5]} and {theirs[at : at + 5]}).",
                "Use the tokenizer.json that its authors give.",
            )
    backend.save(str(to))


def _sentencepiece(path: Path) -> tuple[tokenizers.Tokenizer, Ids]:
    import sentencepiece
    from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

    try:
        own = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{path} is no model of sentencepiece ({error}).", "Name the .model file.") from error
    proto = import_protobuf().ModelProto()
    proto.ParseFromString(path.read_bytes())
    is_bpe, spec, trained = proto.trainer_spec.model_type == 2, proto.normalizer_spec, proto.trainer_spec
    if trained.model_type not in (1, 2):
        raise DataError(f"{path} splits into words or characters.", "Take a model of type unigram or bpe.")
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    if is_bpe:
        vocab = {piece: number for number, (piece, _) in enumerate(scores)}
        model: Any = models.BPE(
            vocab, generate_merges(vocab, scores), unk_token=trained.unk_piece, fuse_unk=True,
            byte_fallback=trained.byte_fallback,
        )  # fmt: skip
    else:
        model = models.Unigram(scores, unk_id=trained.unk_id, byte_fallback=trained.byte_fallback)
    backend = tokenizers.Tokenizer(model)
    steps: list[Any] = []
    normal = tokenizers.normalizers
    if spec.precompiled_charsmap:
        steps.append(normal.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normal.Strip(left=True, right=True), normal.Replace(Regex(" {2,}"), " ")]
    scheme = "always" if spec.add_dummy_prefix else "never"
    if spec.add_dummy_prefix and not spec.remove_extra_whitespaces:
        # Metaspace puts no space before a text that begins with one; sentencepiece does.
        steps += [normal.Prepend("\u2581"), normal.Replace(" ", "\u2581")]
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme=scheme, split=not is_bpe)
    if steps:
        backend.normalizer = normal.Sequence(steps)
    backend.decoder = decoders.Sequence([
        decoders.ByteFallback(), decoders.Metaspace("\u2581", prepend_scheme=scheme), decoders.Fuse(),
    ])  # fmt: skip
    backend.post_processor = None
    added = [piece for piece in proto.pieces if piece.type in (3, 4)]  # control symbols such as </s>; a user's own
    backend.add_tokens([AddedToken(piece.piece, normalized=False, special=piece.type == 3) for piece in added])
    return backend, lambda text: own.encode(text)


def _tiktoken(path: Path, split: str | None) -> tuple[tokenizers.Tokenizer, Ids]:
    import tiktoken
    from transformers.convert_slow_tokenizer import TikTokenConverter

    split = split or next((name for name in SPLITS if path.name.startswith(name)), None)
    if split not in SPLITS:
        raise DataError(
            f"{path} does not say how text is split into words.", f"Say it: --tiktoken-split {' | '.join(SPLITS)}"
        )
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise DataError(f"{path} is no file of tiktoken's ranks ({error}).", "Each line is: base64 rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"{path}: its ranks are not 0 to {len(ranks) - 1}.", "Fetch the file again.")

    class Converter(TikTokenConverter):  # type: ignore[misc]
        """Without tiktoken's own reader, which keeps a copy of every file that it is given."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks

    backend: tokenizers.Tokenizer = Converter(str(path), pattern=SPLITS[split]).converted()
    end = max(_END_OF_TEXT[split], len(ranks)) if len(ranks) > 50_000 else len(ranks)
    names = [f"<|unused_{number}|>" for number in range(len(ranks), end)] + [EOS_TOKEN]
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    own = tiktoken.Encoding(path.stem, pat_str=SPLITS[split], mergeable_ranks=ranks, special_tokens={EOS_TOKEN: end})
    return backend, own.encode_ordinary
