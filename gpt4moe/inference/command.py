"""The command of tools/generate.py: arguments, checks, one rank's part of the work, what stdout gets."""

import argparse
import errno
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

from gpt4moe.architecture.encoder_folder import encoder_identity
from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.config.vision import EncoderKind
from gpt4moe.errors import ConfigError, LaunchError
from gpt4moe.inference.files import Prompt, read_prompts, refuse_other_settings
from gpt4moe.inference.load import LoadedModel, Opened, OpenWeights, open_folder, placed, require_placeable
from gpt4moe.inference.requests import Limits
from gpt4moe.inference.sampling import Sampling
from gpt4moe.inference.sight import Clip, Sight, clip_of, sight_of, with_encoder
from gpt4moe.inference.text import Words
from gpt4moe.inference.writing import Wish, answers, write_file
from gpt4moe.parallel.agreement import raise_together
from gpt4moe.parallel.environment import Environment

DEGREES = ("tp", "pp", "vpp", "ep", "etp")


class Arguments(argparse.ArgumentParser):
    """Raises: ConfigError for bad arguments, so that one rank alone prints it."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.", f"{self.prog} --help lists the arguments.")


def parser(description: str) -> argparse.ArgumentParser:
    out = Arguments(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("folder", type=Path, help="a step folder, a run folder (its latest checkpoint), a Hugging Face "
                     "folder, or one made by to-inference")  # fmt: skip
    what = out.add_argument_group("prompts and answers")
    what.add_argument("--prompt", action="extend", nargs="+", help='texts to continue (default "The ")')
    what.add_argument("--image", action="extend", nargs="+", help="of the next <image> in the prompts: a file, or a "
                      "clip: a folder of frames or a.png,b.png")  # fmt: skip
    what.add_argument("--input", type=Path, help='jsonl of {"id", "prompt"} or {"id", "messages"}, with "images"')
    what.add_argument("--output", type=Path, help="jsonl of answers in the order of prompts; it is resumed if there")
    what.add_argument("--chat", action="store_true", help="a prompt is what a user says, put into the chat template")
    what.add_argument("--json", action="store_true", help="answers as one JSON list on stdout")
    add_sight(what)
    add_sampling(out).add_argument("--num-samples", type=int, default=1, help="texts for each prompt (default 1)")
    layout = add_layout(out)
    add_limits(layout)
    return out


def add_sampling(to: argparse.ArgumentParser) -> Any:
    """The arguments that wanted_sampling reads, --tokens and --stop. Returns: their group."""
    drawn = to.add_argument_group("sampling")
    drawn.add_argument("--tokens", type=int, default=60, help="new tokens of a text at most (default 60)")
    drawn.add_argument("--temperature", type=float, default=0.8, help="0: the most probable token (default 0.8)")
    drawn.add_argument("--top-k", type=int, default=0, help="among this many tokens (default 0: all)")
    drawn.add_argument("--top-p", type=float, default=0.95, help="among this share of probability (default 0.95)")
    drawn.add_argument("--min-p", type=float, default=0.0, help="among tokens of this share of the largest probability")
    drawn.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: fewer repetitions (default 1)")
    drawn.add_argument("--stop", action="append", default=[], help="end before this text (may be repeated)")
    drawn.add_argument("--seed", type=int, default=0, help="same seed and prompt, same text, on every layout")
    return drawn


def add_sight(to: Any) -> None:
    """The arguments of a vision model's images, which seen reads."""
    to.add_argument("--image-token", help="the special token that stands for an image (default <image>)")
    to.add_argument("--encoder", type=Path, help="folder of the image encoder, where it has moved (default: the run's)")


def add_limits(layout: Any) -> None:
    """The arguments that wanted_limits reads."""
    layout.add_argument("--max-rows", type=int, default=32, help="texts that grow together (default 32)")
    layout.add_argument("--cache-gb", type=float, help="keys and values on a rank at most (default: what is free)")


def add_layout(to: argparse.ArgumentParser) -> Any:
    """The layout's arguments, which wanted_parallel reads. Returns: their group."""
    layout = to.add_argument_group("layout", "one process: the whole model; under a launcher: that of the run")
    for name in DEGREES:
        layout.add_argument(f"--{name}", type=int, help=f"parallel.{name}")
    return layout


def run(options: argparse.Namespace, environment: Environment, open_weights: OpenWeights) -> None:
    """This rank's part. Raises: Gpt4MoeError, the same on every rank."""
    opened = open_folder(options.folder, open_weights)
    words = opened.words()
    wish = _wish(options, words, sight_of(opened.run, words, options.image_token))
    opened = seen(options, opened, has_images=bool(wish.images))
    parallel = wanted_parallel(options, opened, environment)
    require_placeable(replace(opened.run, parallel=parallel), environment.world_size)
    weights = {} if options.output is None else weights_of(opened, has_images=bool(wish.images))
    if options.output is not None:
        refuse_other_settings(options.output, {**weights, **wish.settings()})
    with placed(opened, parallel=parallel, environment=environment) as model:
        if options.output is not None:
            write_file(model, words, wish, options.output, weights=weights)
        else:
            _to_terminal(model, words, wish, is_json=options.json)


def seen(options: argparse.Namespace, opened: Opened, *, has_images: bool) -> Opened:
    """With its encoder where --encoder says, checked where there are images. Raises: ConfigError."""
    if not has_images and options.encoder is None:
        return opened
    if opened.run.model.vision is None:
        raise ConfigError(f"--encoder {options.encoder}: the folder has a text model.", "Leave --encoder out.")
    return replace(opened, run=with_encoder(opened.run, options.encoder, opened.encoder))


def weights_of(opened: Opened, *, has_images: bool = False) -> dict[str, Any]:
    """Settings of a file of answers that tell one model from another.

    Args:
        has_images: the encoder's files count too; a fresh encoder follows from the run's seed.
    Raises: ConfigError, as encoder_identity.
    """
    found = {"step": opened.step, "weights": opened.fingerprint()}
    vision = opened.run.model.vision
    if has_images and vision is not None and vision.encoder.kind is EncoderKind.folder:
        identity = encoder_identity(Path(vision.encoder.folder or ""), lambda done, total: None)
        found["encoder"] = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return found


def _wish(options: argparse.Namespace, words: Words, sight: Sight) -> Wish:
    require_positive(options, "tokens", "num_samples", "max_rows")
    sampling = wanted_sampling(options)
    if options.input is not None and options.prompt:
        raise ConfigError("Both --input and --prompt give prompts.", "Leave one out.")
    if options.input is not None and options.image:
        raise ConfigError("--image gives images of --prompt.", 'Name those of --input in its lines: "images": [...].')
    if options.json and options.output is not None:
        raise ConfigError("--json prints answers, --output writes them to a file.", "Leave one out.")
    if options.input is not None and options.output is not None and options.output.resolve() == options.input.resolve():
        raise ConfigError(f"{options.input} is both --input and --output.", "Write the answers to another file.")
    if options.input is not None:
        prompts = read_prompts(options.input)
    else:
        asked = options.prompt or ["The "]
        dealt = _dealt(options.image or [], asked, sight)
        prompts = [_asked(number, text, clips, options.chat) for number, (text, clips) in enumerate(dealt)]
    empty = next((prompt.id for prompt in prompts if prompt.text == ""), None)
    if empty is not None:
        raise ConfigError(f"Prompt {empty!r} is empty.", "Give a text, at least a space, or leave the prompt out.")
    texts = [words.render(prompt.messages) if prompt.messages else prompt.text or "" for prompt in prompts]
    tokens = [
        sight.encode(
            text, len(prompt.images), is_chat=prompt.messages is not None, what=f"Prompt {prompt.id!r}"
        ) for text, prompt in zip(texts, prompts, strict=True)
    ]  # fmt: skip
    images = [sight.pictures(some, prompt.images) for some, prompt in zip(tokens, prompts, strict=True)]
    return Wish(
        prompts=prompts, texts=texts, tokens=tokens, num_tokens=options.tokens, num_samples=options.num_samples,
        sampling=sampling, stops=options.stop, limits=wanted_limits(options), images=images if any(images) else (),
        banned=sight.banned,
    )  # fmt: skip


def require_positive(options: argparse.Namespace, *names: str) -> None:
    """Raises: ConfigError for one that is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)} is below 1.", "Set 1 or more.")


def wanted_sampling(options: argparse.Namespace) -> Sampling:
    """Raises: ConfigError for what draws no token, and for an empty stop string."""
    sampling = Sampling(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, min_p=options.min_p,
        repetition_penalty=options.repetition_penalty, seed=options.seed,
    )  # fmt: skip
    sampling.validate()
    if "" in options.stop:
        raise ConfigError("--stop '' would end every text at once.", "Give a text, or leave --stop out.")
    return sampling


def wanted_limits(options: argparse.Namespace) -> Limits:
    if options.cache_gb is None:
        return Limits(max_rows=options.max_rows)
    if not 0 < options.cache_gb < float("inf"):
        raise ConfigError(f"--cache-gb {options.cache_gb} is no size.", "Set gigabytes above 0, or leave it out.")
    return Limits(max_rows=options.max_rows, cache_bytes=int(options.cache_gb * 10**9))


def _dealt(images: Sequence[str], texts: Sequence[str], sight: Sight) -> list[tuple[str, list[Clip]]]:
    """Each text with the images of its tags. Raises: ConfigError for another number of them, of several texts."""
    clips = [clip_of(image) for image in images]
    if clips:
        sight.require("--image")
    if len(texts) == 1:
        return [(texts[0], clips)]
    counts = [sight.num_tags(text) for text in texts]
    if sum(counts) != len(clips):
        raise ConfigError(
            f"{len(clips)} --image for {sum(counts)} {sight.token} in {len(texts)} prompts.",
            f"Give one for each {sight.token}, in their order.",
        )
    ends = list(accumulate(counts))
    return [(text, clips[end - count : end]) for text, count, end in zip(texts, counts, ends, strict=True)]


def _asked(number: int, text: str, images: Sequence[Clip], is_chat: bool) -> Prompt:
    """Raises: ConfigError for an argument that is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"--prompt {text!r} is no UTF-8.", "Give UTF-8, or the prompts as --input.") from error
    if is_chat:
        return Prompt(id=number, messages=[{"role": "user", "content": text}], images=images)
    return Prompt(id=number, text=text, images=images)


def wanted_parallel(options: argparse.Namespace, opened: Opened, environment: Environment) -> ParallelConfig:
    """The layout that is asked for, else the run's own; in one process none."""
    given = {name: getattr(options, name) for name in DEGREES if getattr(options, name) is not None}
    if given or environment.world_size == 1:
        parallel = ParallelConfig(**given)
    else:
        parallel = replace(opened.run.parallel, recompute=Recompute.none, recompute_layers=None)
    parallel.validate()
    return parallel


def _to_terminal(model: LoadedModel, words: Words, wish: Wish, *, is_json: bool) -> None:
    """Each text as it grows, or all answers as one JSON list. Collective.

    Raises: LaunchError on every rank, after the text that is growing, when stdout takes no more.
    """
    refused: OSError | None = None

    def show(text: str) -> None:
        nonlocal refused
        if model.groups.is_first_rank and refused is None:
            try:
                write_stdout(text)
            except OSError as error:  # noted, because the other ranks are amid a step
                refused = error

    def require_reader(found: int) -> None:
        with raise_together(model.groups):
            if refused is not None:
                raise closed_stdout(f"after {found} of {len(wish.texts) * wish.num_samples} texts", refused)

    if is_json:
        listed = list(answers(model, words, wish))
        shown = [{"prompt": wish.texts[at // wish.num_samples], **one} for at, one in enumerate(listed)]
        show(json.dumps(shown, ensure_ascii=False) + "\n")
        require_reader(0)
        return
    is_stream = model.groups.layout.dp * model.groups.layout.cp == 1
    headings = [f"--- {text!r}\n{text}" for text in wish.texts for _ in range(wish.num_samples)]
    show(headings[0])
    for found, answer in enumerate(answers(model, words, wish, show=show if is_stream else None), start=1):
        show(("" if is_stream else answer["text"]) + "\n" + (headings[found] if found < len(headings) else ""))
        require_reader(found)


def write_stdout(text: str) -> None:
    """Raises: OSError when nobody reads stdout, it was closed before the start, or its disk is full."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    sys.stdout.write(text)
    sys.stdout.flush()


def closed_stdout(
    when: str, error: OSError, cure: str = "write a file that can be resumed: --output answers.jsonl."
) -> LaunchError:
    """The error for one of write_stdout; nothing is written to stdout from now on."""
    if sys.stdout is not None:
        # Otherwise Python flushes stdout once more when it ends, and complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return LaunchError(
        f"stdout was closed {when} ({(error.strerror or str(error)).lower()}).",
        f"Let its reader read on, or {cure}",
    )
