"""The options of tools/tokenize_corpus.py, and what it does with them."""

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt4moe.corpus.build import Bar, Order, build_source
from gpt4moe.corpus.decontamination import Decontamination
from gpt4moe.corpus.encoder import choose_library, open_tokenizer
from gpt4moe.corpus.fill_in_the_middle import KNOWN_TOKENS, token_ids
from gpt4moe.corpus.foreign import SPLITS, convert, is_foreign
from gpt4moe.corpus.inputs import TREE_SUFFIXES, Inputs, find_inputs
from gpt4moe.corpus.piece import Recipe
from gpt4moe.corpus.quality import require_decodable
from gpt4moe.corpus.records import TO_UTF8
from gpt4moe.corpus.sample import sample_of, texts_to_train_on
from gpt4moe.data.folder import TOKENIZER_NAME, finish_folder, folder_to_fill, require_source_name, vocabulary_of
from gpt4moe.data.indexed_writer import token_dtype
from gpt4moe.data.manifest import MANIFEST_NAME, DataManifest, SourceManifest
from gpt4moe.data.source_command import named, require_named_once, require_share
from gpt4moe.data.tokenizer import require_vocabulary, train_tokenizer
from gpt4moe.errors import ConfigError, DataError

Say = Callable[[str], None]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the data folder to make, or to add sources to")
    add("--source", action="append", default=[], metavar="NAME=PATH[,PATH...]", type=named, help="a source to make")
    add("--extend", action="append", default=[], metavar="NAME=PATH[,PATH...]", type=named,
        help="new files for a source that is there, by the options that it was made with")  # fmt: skip
    add("--tokenizer", type=Path, help="a tokenizer.json, sentencepiece .model or .tiktoken file (default: of --out)")
    add("--train-tokenizer", type=int, metavar="VOCAB_SIZE", help="train a byte-level BPE on a sample of the sources")
    add("--tokenizer-sample-mb", type=int, default=100, help="of text to train it on, from all sources alike (100)")
    add("--tiktoken-split", choices=SPLITS, help="of a .tiktoken file whose name does not say")
    add("--licence", action="append", default=[], metavar="NAME=LICENCE", type=named)
    add("--held-out", type=float, default=0.01, help="share of documents for validation (0.01)")
    add("--field", default="text", help="key or column that has the text (text)")
    add("--tree", action="append", default=[], metavar="NAME", help="a source tree though its folder has jsonl too")
    add("--suffixes", help="of files of a source tree: .py,.md (default: those of code and prose)")
    add("--processes", type=int, default=1, help="the result is the same for any number (1)")
    add("--deduplicate", action="store_true", help="of documents that are equal the first stays")
    add("--decontaminate", action="append", default=[], metavar="FILE", help="evaluation file: jsonl or text")
    add("--decontaminate-words", type=int, default=13, help="in a row, that a document must not share with it (13)")
    add("--fim", action="append", default=[], metavar="NAME=RATE", type=named, help="fill-in-the-middle for a source")
    add("--fim-spm", type=float, default=0.5, help="share of those in SPM form, the others PSM (0.5)")
    add("--fim-tokens", metavar="PREFIX,MIDDLE,SUFFIX", help="special tokens (default: the known names)")
    add("--seed", type=int, default=1, help="of fill-in-the-middle (1)")
    add("--accept-nonsense", action="store_true", help="make it though most is <unk>, or a few tokens repeat")
    return parser


def run(given: argparse.Namespace, bar: Bar, say: Say) -> dict[str, SourceManifest]:
    """Makes the sources. Raises: ConfigError or DataError; sources that come before the bad one are made then."""
    _check(given)
    fim = {name: float(rate) for name, rate in given.fim}
    suffixes = frozenset(given.suffixes.split(",")) if given.suffixes else TREE_SUFFIXES
    try:
        inputs = {
            name: find_inputs(name, paths.split(","), suffixes, is_tree=name in given.tree, out=given.out)
            for name, paths in (*given.source, *given.extend)
        }
        with folder_to_fill(given.out):
            return _make(given, inputs, fim, bar, say)
    except OSError as error:
        raise DataError(
            f"{error.filename or given.out}: {error.strerror}.",
            "Make room, or choose another --out; the same command goes on where it ended.",
        ) from error


def _make(
    given: argparse.Namespace, inputs: dict[str, Inputs], fim: dict[str, float], bar: Bar, say: Say
) -> dict[str, SourceManifest]:
    samples = {name: sample_of(found, given.field) for name, found in inputs.items()}
    path = _tokenizer(given, inputs, samples, bool(fim), say)
    tokenizer = open_tokenizer(path)
    vocabulary = vocabulary_of(given.out, tokenizer, path, replaced=[name for name, _ in given.source])
    evaluation = [Path(file) for file in given.decontaminate]
    if evaluation:
        Decontamination(evaluation, given.decontaminate_words)  # refused here, before there is work
    names = given.fim_tokens.split(",") if given.fim_tokens else None
    if fim:
        token_ids(tokenizer, names)
    made = {}
    for name, found in inputs.items():
        sample = samples[name]
        ids = tokenizer.encode_batch(sample)
        if not given.accept_nonsense:
            require_decodable(name, tokenizer, sample, ids)
        library, reason = choose_library(path, [text.encode() for text in sample], ids)
        say(f"{name}: {library}: {reason}")
        recipe = Recipe(
            tokenizer=str(path), tokenizer_sha256=vocabulary.tokenizer_sha256, library=library,
            field=given.field, held_out=given.held_out, deduplicate=given.deduplicate, evaluation=given.decontaminate,
            evaluation_sha256=[hashlib.sha256(file.read_bytes()).hexdigest() for file in evaluation],
            words=given.decontaminate_words, fim_rate=fim.get(name, 0.0), fim_spm_share=given.fim_spm,
            fim_tokens=names, seed=given.seed,
        )  # fmt: skip
        order = Order(
            name=name, inputs=found, recipe=recipe, dtype=token_dtype(tokenizer.vocab_size),
            licence=dict(given.licence).get(name), extends=name in dict(given.extend),
            accept_nonsense=given.accept_nonsense,
        )  # fmt: skip
        made[name] = build_source(given.out, order, processes=given.processes, bar=bar, say=say)
    finish_folder(given.out, vocabulary, path)
    if given.tokenizer is not None and is_foreign(given.tokenizer):
        path.unlink()
    return made


def _tokenizer(
    given: argparse.Namespace, inputs: dict[str, Inputs], samples: dict[str, list[str]], with_fim: bool, say: Say
) -> Path:
    kept: Path = given.out / TOKENIZER_NAME
    if given.train_tokenizer is not None:
        if (given.out / MANIFEST_NAME).exists():
            raise DataError(f"{given.out} has a tokenizer.", "Leave --train-tokenizer out, or choose another --out.")
        say("training a tokenizer")
        texts = texts_to_train_on(inputs, given.field, given.tokenizer_sample_mb * 1_000_000)
        special = KNOWN_TOKENS[0] if with_fim and not given.fim_tokens else ()
        if given.fim_tokens and with_fim:
            special = tuple(given.fim_tokens.split(","))
        train_tokenizer(texts, vocab_size=given.train_tokenizer, special=special).backend.save(str(kept))
        return kept
    if given.tokenizer is None:
        if not kept.is_file():
            raise ConfigError(
                "No tokenizer is named.",
                "Give --tokenizer FILE, or --train-tokenizer 32768 to train one on the sources.",
            )
        if (given.out / MANIFEST_NAME).is_file():
            kept = given.out / DataManifest.read(given.out).tokenizer
        return kept
    if is_foreign(given.tokenizer):
        say(f"converting {given.tokenizer}")
        sample = [text for texts in samples.values() for text in texts]
        # Beside the folder's own: vocabulary_of compares the two.
        kept = given.out / f".{given.tokenizer.stem}.json"
        convert(given.tokenizer, kept, sample, split=given.tiktoken_split)
        return kept
    path: Path = given.tokenizer
    return path


def _check(given: argparse.Namespace) -> None:
    """Raises: ConfigError for options that mean nothing."""
    names = [name for name, _ in (*given.source, *given.extend)]
    if not names:
        raise ConfigError("No source is named.", "Write --source NAME=FILE, or --extend NAME=FILE.")
    for name in names:
        require_source_name(name)
    require_named_once("--source", names)
    trees = [(name, "") for name in given.tree]
    for option, pairs in (("--licence", given.licence), ("--fim", given.fim), ("--tree", trees)):
        require_named_once(option, [name for name, _ in pairs])
        for name, _ in pairs:
            if name not in names:
                raise ConfigError(f"{option} {name}= is of no source.", f"The sources are: {', '.join(names)}.")
    for name in (TOKENIZER_NAME, MANIFEST_NAME):
        if (given.out / name).is_dir():
            raise DataError(f"{given.out / name} is a folder, and a file is written there.", "Choose another --out.")
    for option, share in (("--held-out", given.held_out), ("--fim-spm", given.fim_spm), *_rates(given)):
        require_share(option, share)
    if given.held_out in (0, 1):
        raise ConfigError(
            f"--held-out is {given.held_out:g}: every source has documents to train on and held-out ones.",
            "Give a share between 0 and 1; 0.0001 holds out few of a large source.",
        )
    for option, number in (
        ("--processes", given.processes), ("--decontaminate-words", given.decontaminate_words),
        ("--tokenizer-sample-mb", given.tokenizer_sample_mb),
    ):  # fmt: skip
        if number < 1:
            raise ConfigError(f"{option} is {number}.", "It is at least 1.")
    if not 0 <= given.seed < 2**64:
        raise ConfigError(f"--seed is {given.seed}.", "It is a number from 0 below 2**64.")
    if given.train_tokenizer is not None:
        if given.tokenizer is not None:
            raise ConfigError("--tokenizer and --train-tokenizer are both given.", "Leave one out.")
        require_vocabulary(given.train_tokenizer)
    if given.fim_tokens and len(given.fim_tokens.split(",")) != 3:
        raise ConfigError(f"--fim-tokens {given.fim_tokens} names not three.", "Write PREFIX,MIDDLE,SUFFIX.")


def _rates(given: argparse.Namespace) -> list[tuple[str, float]]:
    try:
        return [(f"--fim {name}", float(rate)) for name, rate in given.fim]
    except ValueError as error:
        raise ConfigError(f"--fim: {error}.", "Write --fim code=0.5") from error


def summary(name: str, manifest: SourceManifest) -> list[str]:
    """What was made, for a person."""
    text: dict[str, Any] = dict(manifest.text or {})
    documents, tokens = sum(text["documents"].values()), sum(text["tokens"].values())
    size = sum(text.get("bytes", text["bytes_read"]).values())  # a source made before has bytes_read alone
    lines = [
        f"{name}: {documents:,} documents, {tokens:,} tokens, {size / max(1, tokens):.2f} bytes a token, "
        f"{text['unknown_share']:.2%} unknown, {text['unigram_entropy_bits']:.2f} bits of unigram entropy"
    ]
    for key, what in (("removed", "documents removed"), ("files_skipped", "files not read")):
        if text[key]:
            lines.append(f"{name}: {what}: " + ", ".join(f"{count:,} {reason}" for reason, count in text[key].items()))
    if "not UTF-8" in text["files_skipped"]:
        lines.append(f"{name}: of the files that are not UTF-8, those that are Latin-1 can be read after {TO_UTF8}")
    return lines
