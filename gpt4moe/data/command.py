"""The commands of tools/mixture.py: what stdout gets, as JSON and as lines."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.data.blocks import restore
from gpt4moe.data.catalogue import TOKENIZER_CURE, Catalogue, tokenizer_problems
from gpt4moe.data.manifest import SPLITS
from gpt4moe.data.overview import overview
from gpt4moe.data.passed_over import NOTHING, PassedOver, read_gone_back
from gpt4moe.data.progress import byte_bar
from gpt4moe.data.register import register
from gpt4moe.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one command."""

    facts: dict[str, Any]
    lines: Sequence[str] = ()
    """The same for a person; none: a table is made of the facts."""
    status: int = 0


def answer(command: str, words: Sequence[str]) -> Answer:
    """Raises: ConfigError for bad arguments, DataError as the commands do."""
    commands = {"show": _show, "sample": _sample, "step": _step, "verify": _verify, "register": _register}
    if command not in commands:
        raise ConfigError(f"{command!r} is no command.", f"Choose of: {', '.join(commands)}.")
    return commands[command](list(words))


def _run(overrides: list[str]) -> RunConfig:
    is_named = any(word.lstrip("+").startswith("run.name=") for word in overrides)
    return load_run_config(overrides if is_named else [*overrides, "run.name=mixture"])


def passed_over_by(run: RunConfig) -> PassedOver:
    """What the run of this name has passed over (resilience.on_nonfinite=go_back). Raises: DataError."""
    found = read_gone_back(Path(run.run.root) / run.run.name)
    return found[0] if found else NOTHING


def _show(words: list[str]) -> Answer:
    return Answer(overview(_run(words)))


def _sample(words: list[str]) -> Answer:
    from gpt4moe.data.check import check_data
    from gpt4moe.data.lookup import origin_of
    from gpt4moe.data.tokenizer import load_tokenizer

    if not words or not words[0].isdecimal():
        raise ConfigError("sample wants a number from 0.", "Write: mixture.py sample 4711 +experiment=tiny")
    run = _run(words[1:])
    checked = check_data(run, is_new=False)
    origin, tokens = origin_of(run, checked, int(words[0]))
    facts = dataclasses.asdict(origin)
    after = passed_over_by(run).position(run.step_sizes.samples(run.training.steps))
    facts["is_beyond_end"] = int(words[0]) >= after
    assert checked.tokenizer is not None
    text = load_tokenizer(checked.tokenizer).decode(tokens)
    told = [f"{key:<18} {value}" for key, value in facts.items()]
    if facts["is_beyond_end"]:
        told.append(
            f"training.steps={run.training.steps} ends with sample {after - 1}: a longer run would read this one"
        )
    return Answer(facts, [*told, "", text])


def _step(words: list[str]) -> Answer:
    if not words or not words[0].isdecimal() or words[0] == "0":
        raise ConfigError("step wants a number from 1.", "Write: mixture.py step 20 +experiment=tiny")
    run, step = _run(words[1:]), int(words[0])
    sizes = run.step_sizes
    skipped = passed_over_by(run)
    first = skipped.position(sizes.samples(step - 1))
    after = first + sizes.at_step(step).global_batch_size
    facts = {"step": step, "first_sample": first, "last_sample": after - 1, "samples": after - first}
    facts["is_beyond_end"] = step > run.training.steps
    beyond = f"; training.steps={run.training.steps} ends before, a longer run would" if facts["is_beyond_end"] else ""
    length = sizes.at_step(step).seq_length
    return Answer(facts | {"seq_length": length, "tokens": (after - first) * length}, [
        f"step {step} reads the samples {first} to {after - 1}: {after - first} sequences of {length} tokens; "
        f"mixture.py sample shows one{beyond}",
    ])  # fmt: skip


def _verify(words: list[str]) -> Answer:
    from gpt4moe.data.lookup import all_shards, verify_images_of, verify_shard

    if not words:
        raise ConfigError("verify wants data folders.", "Write: mixture.py verify data/demo")
    catalogue = Catalogue.open([Path(word) for word in words])
    shards = list(all_shards(catalogue))
    illustrated = [source.manifest.images for source in catalogue.sources.values()]
    images = [one for found in illustrated if found is not None for split in SPLITS for one in found.shards[split]]
    total = sum(shard.tokens * np.dtype(shard.dtype).itemsize for _, shard in shards) + sum(one.bytes for one in images)
    problems = [found for folder in catalogue.folders for found in tokenizer_problems(folder)]
    cures = {"tokenizer": TOKENIZER_CURE} if problems else {}
    with byte_bar("verify", total) as advance:
        for source, shard in shards:
            found = verify_shard(source, shard, catalogue.vocabulary.vocab_size, advance)
            cures |= {source.name: restore(source.manifest.made_by)} if found else {}
            problems += found
        for source in catalogue.sources.values():
            found = verify_images_of(source, advance)
            cures |= {source.name: restore(source.manifest.made_by)} if found else {}
            problems += found
    count = len(shards) + len(images)
    facts = {"shards": count, "bytes": total, "problems": problems, "cures": cures}
    fixes = [f"fix: {name}: {cure}" for name, cure in cures.items()]
    return Answer(
        facts, [*problems, *fixes] or [f"{count} shards, {total:,} bytes: as they were written."], int(bool(problems))
    )


def _register(words: list[str]) -> Answer:
    parser = argparse.ArgumentParser(prog="mixture.py register", usage="see mixture.py --help")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--source", required=True, metavar="NAME=PATH[,PATH]")
    parser.add_argument("--valid", required=True, metavar="NAME=PATH[,PATH]")
    parser.add_argument("--licence", default="unknown")
    given = parser.parse_args(words)
    (name, train), (other, valid) = (_named(text) for text in (given.source, given.valid))
    if name != other:
        raise ConfigError(f"--source is {name}, --valid is {other}.", "Register one source at a time.")
    messages = Console(stderr=True)
    manifest = register(
        given.folder, name, train=train, valid=valid, tokenizer_path=given.tokenizer, licence=given.licence,
        progress=lambda path: messages.print(f"reading {path}", markup=False),
    )  # fmt: skip
    facts = {
        split: {"tokens": manifest.num_tokens(split), "documents": manifest.num_documents(split)}
        for split in ("train", "valid")
    }
    return Answer({name: facts}, [f"{given.folder / name}: {facts}"])


def _named(text: str) -> tuple[str, list[Path]]:
    name, _, paths = text.partition("=")
    if not name or not paths:
        raise ConfigError(f"{text!r} is not NAME=PATH.", "Write --source web=folder/web_text_document.")
    return name, [Path(path) for path in paths.split(",")]
