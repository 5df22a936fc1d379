"""The sub-commands of tools/convert_checkpoint.py: options, calls, and answers in lines. No torch."""

import argparse
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpt4moe.checkpoint.inspection_text import size, table, tolerance
from gpt4moe.convert.adapters import merge
from gpt4moe.convert.architectures import known_names
from gpt4moe.convert.export import DTYPES
from gpt4moe.convert.from_huggingface import Upcycling, from_huggingface
from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.convert.idefics import to_idefics
from gpt4moe.convert.inference_layout import to_inference_layout
from gpt4moe.convert.peft_folder import to_peft
from gpt4moe.convert.verify import (
    DIFFERENCES,
    LOGITS_TOLERANCE,
    Logits,
    read_prompts,
    require_runnable,
    verify,
    verify_logits,
)
from gpt4moe.errors import ConversionError

Answer = dict[str, Any]

_SHOWN = 20  # rows; --json has all
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

_HELP = {
    "to-hf": "write a checkpoint as a Hugging Face folder (Mixtral or Qwen3-MoE; Llama or Qwen3 without experts); of a "
    "vision model also its image parts, in a folder vision/ that examples/load_vision.py loads",
    "to-idefics": "write a dense vision model with a CLIP encoder as transformers' Idefics (IdeficsForVisionText2Text)",
    "from-hf": f"make a checkpoint for checkpoint.load from a {known_names()} folder; with the vision/ of to-hf "
    "beside it, a vision model's",
    "merge": "write a checkpoint of adapters (stage.lora) and its base as one whole checkpoint",
    "to-peft": "write the adapters of a checkpoint as a folder that PEFT loads",
    "to-inference": "cut a checkpoint into one file for each rank of a tp x pp grid",
    "verify": "compare two folders of any format; exit status 1 when they differ",
}
_PLACES = {"from-hf": ("folder", "out"), "verify": ("a", "b")}


def parser(description: str) -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(dest="command", required=True, metavar="|".join(_HELP))
    of = {name: commands.add_parser(name, help=text, description=text) for name, text in _HELP.items()}
    for name, command in of.items():
        for place in _PLACES.get(name, ("checkpoint", "out")):
            command.add_argument(place, type=Path, metavar=place.upper())
        command.add_argument("--json", action="store_true", help="print the answer as JSON")
    for name in ("to-hf", "to-idefics", "to-inference"):
        of[name].add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="of the weights (default bf16)")
        of[name].add_argument("--dry-run", action="store_true", help="print what would be written, write nothing")
    for name in ("to-hf", "to-idefics"):
        of[name].add_argument("--max-shard-size", type=byte_size, default="5GB", metavar="SIZE", help="(default 5GB)")
        of[name].add_argument("--tokenizer", type=Path, help="the run's tokenizer.json, if it was moved")
        of[name].add_argument("--licence", default="apache-2.0", help="for the model card (default apache-2.0)")
    of["to-idefics"].add_argument("--without-clips", action="store_true", help="leave out the time embeddings of clips")
    for name in ("to-hf", "to-idefics", "verify"):
        of[name].add_argument("--encoder", type=Path, help="of a vision model: its encoder's folder, if it was moved")
    of["to-hf"].add_argument("--image-token", help="of a vision model: what stands for an image (default <image>)")
    of["from-hf"].add_argument("--upcycle-experts", type=int, metavar="N", help="copies of each MLP of a dense model")
    of["from-hf"].add_argument("--upcycle-top-k", type=int, metavar="K", help="experts for each token (default 2)")
    of["from-hf"].add_argument("--upcycle-noise", type=float, help="noise on the copies, as a share of init_std (0)")
    of["from-hf"].add_argument("--seed", type=int, dest="upcycle_seed", help="seed of new routers and noise (1234)")
    for name in ("merge", "to-peft", "to-hf", "to-idefics", "to-inference", "verify"):
        of[name].add_argument("--base", type=Path, help="of adapters: the base's checkpoint, if it was moved")
    of["to-peft"].add_argument("--model", required=True, help="the base as PEFT finds it: a folder made by to-hf")
    for axis in ("tp", "pp"):
        of["to-inference"].add_argument(f"--{axis}", type=int, required=True)
    of["to-inference"].add_argument("--layers-per-stage", type=whole_numbers, metavar="N,N,...", help="(default: even)")
    of["verify"].add_argument("--tolerance", type=tolerance, default=0.0, help="largest |a - b| of weights (0)")
    of["verify"].add_argument("--text-only", action="store_true", help="of vision models: compare their text models")
    of["verify"].add_argument("--prompts", type=Path, help="compare logits too, on each line of this file")
    of["verify"].add_argument("--logits-tolerance", type=tolerance, default=LOGITS_TOLERANCE, help="of logits (1e-4)")
    return whole


def answered(given: argparse.Namespace, logits: Logits) -> Answer:
    """Runs the command. Raises: Gpt4MoeError."""
    begin = time.perf_counter()
    answer = _CALLS[given.command](given, logits)
    return {"dry_run": False} | answer | {"seconds": time.perf_counter() - begin}


def lines(given: argparse.Namespace, answer: Answer) -> list[str]:
    """The answer as lines of text."""
    is_verify = given.command == "verify"
    return list((verification_lines if is_verify else conversion_lines)(answer))


def status(answer: Answer) -> int:
    """Exit status: 1 if a comparison found a difference, else 0."""
    return int(any(answer.get(key) for key in DIFFERENCES) or bool(answer.get("logits", {}).get("different")))


def _to_hf(given: argparse.Namespace, logits: Logits) -> Answer:
    answer = to_huggingface(
        given.checkpoint, given.out, dtype=given.dtype, max_shard_bytes=given.max_shard_size,
        tokenizer=given.tokenizer, licence=given.licence, base=given.base, encoder=given.encoder,
        image_token=given.image_token, dry_run=given.dry_run,
    )  # fmt: skip
    return answer | {"dry_run": given.dry_run}


def _to_idefics(given: argparse.Namespace, logits: Logits) -> Answer:
    answer = to_idefics(
        given.checkpoint, given.out, dtype=given.dtype, max_shard_bytes=given.max_shard_size,
        tokenizer=given.tokenizer, licence=given.licence, base=given.base, encoder=given.encoder,
        without_clips=given.without_clips, dry_run=given.dry_run,
    )  # fmt: skip
    return answer | {"dry_run": given.dry_run}


def _from_hf(given: argparse.Namespace, logits: Logits) -> Answer:
    asked = {"top_k": given.upcycle_top_k, "noise": given.upcycle_noise, "seed": given.upcycle_seed}
    how = {name: value for name, value in asked.items() if value is not None}
    if given.upcycle_experts is None and how:
        raise ConversionError(
            "--upcycle-top-k, --upcycle-noise and --seed need --upcycle-experts.",
            "Say how many experts, or leave them out.",
        )
    upcycling = None
    if given.upcycle_experts is not None:
        upcycling = Upcycling(num_experts=given.upcycle_experts, **how)
    return from_huggingface(given.folder, given.out, upcycling)


def _merge(given: argparse.Namespace, logits: Logits) -> Answer:
    return merge(given.checkpoint, given.out, base=given.base)


def _to_peft(given: argparse.Namespace, logits: Logits) -> Answer:
    return to_peft(given.checkpoint, given.out, model=given.model, base=given.base)


def _to_inference(given: argparse.Namespace, logits: Logits) -> Answer:
    answer = to_inference_layout(
        given.checkpoint, given.out, tp=given.tp, pp=given.pp, layers_per_stage=given.layers_per_stage,
        dtype=given.dtype, base=given.base, dry_run=given.dry_run,
    )  # fmt: skip
    return answer | {"dry_run": given.dry_run}


def _verify(given: argparse.Namespace, logits: Logits) -> Answer:
    prompts = None
    if given.prompts is not None:
        require_runnable(given.a, given.b)
        prompts = read_prompts(given.prompts, [given.a, given.b])
    answer = verify(
        given.a, given.b, tolerance=given.tolerance, base=given.base, encoder=given.encoder, text_only=given.text_only
    )
    if prompts is not None:
        answer["logits"] = verify_logits(
            given.a, given.b, prompts, logits,
            is_rounded=answer["rounded_to_bf16"], tolerance=given.logits_tolerance,
        )  # fmt: skip
    return answer


_CALLS: dict[str, Callable[[argparse.Namespace, Logits], Answer]] = {
    "to-hf": _to_hf, "to-idefics": _to_idefics, "from-hf": _from_hf, "merge": _merge, "to-peft": _to_peft,
    "to-inference": _to_inference, "verify": _verify,
}  # fmt: skip


def byte_size(text: str) -> int:
    """5GB, 500 MB, 1.5GB or plain bytes."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?B?)", text.strip().upper())
    size_bytes = int(float(match.group(1)) * _UNITS[match.group(2)]) if match and match.group(2) in _UNITS else 0
    if size_bytes < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size like 5GB or 500MB")
    return size_bytes


def whole_numbers(text: str) -> list[int]:
    """8,8,7."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list like 8,8,7") from error


def conversion_lines(answer: Answer) -> Iterator[str]:
    """The files that were written, or would be, and their sizes."""
    rows = [(file["name"], size(file["size_bytes"])) for file in answer["files"]]
    yield from table(("FILE", "SIZE"), rows[:_SHOWN])
    if len(rows) > _SHOWN:
        yield f"... and {len(rows) - _SHOWN} more (--json lists all)"
    yield from answer.get("notes", [])
    if "train_with" in answer:
        yield f"a run begins with it by: {answer['train_with']}"
    verb, tempo = ("would write", "") if answer["dry_run"] else ("wrote", f", {_speed(answer)}")
    yield f"{verb} {answer['out']}: {len(rows)} files, {size(answer['size_bytes'])}{tempo}"


def verification_lines(answer: Answer) -> Iterator[str]:
    """The differences, or that there are none."""
    for side in ("a", "b"):
        yield from (f"only in {answer[side]}: {name}" for name in answer[f"only_in_{side}"])
    yield from (f"{row['tensor']}: shape {row['a']} and {row['b']}" for row in answer["other_shape"])
    yield from (f"model.{row['setting']}: {row['a']} and {row['b']}" for row in answer["settings"])
    yield from (f"differs from its copies: {copy}" for copy in answer["copies"])
    yield from answer["changed_files"]
    yield from answer["notes"]
    rows = [
        (row["tensor"], f"{row['elements']} of {row['of']}",
         "not finite" if row["max_abs"] is None else f"{row['max_abs']:.3g}")
        for row in answer["different"]
    ]  # fmt: skip
    if rows:
        yield from table(("TENSOR", "ELEMENTS", "MAX |A-B|"), rows[:_SHOWN])
    if len(rows) > _SHOWN:
        yield f"... and {len(rows) - _SHOWN} more (--json lists all)"
    rounded = " after rounding both to bf16" if answer["rounded_to_bf16"] else ""
    yield f"{len(rows)} of {answer['compared']} tensors differ{rounded}."
    if "logits" in answer:
        logits = answer["logits"]
        yield (
            f"logits of {logits['prompts']} prompts differ by at most {logits['max_abs']:.3g} "
            f"(tolerance {logits['tolerance']:g})."
        )


def _speed(answer: Answer) -> str:
    seconds = max(answer["seconds"], 1e-9)
    return f"{seconds:.1f} s, {answer['size_bytes'] / seconds / 1e9:.2f} GB/s"
