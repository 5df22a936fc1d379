"""The sub-commands of tools/convert_checkpoint.py: their options, and what each calls. No torch."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt4moe.checkpoint.inspection_text import tolerance
from gpt4moe.convert import command_text
from gpt4moe.convert.architectures import known_names
from gpt4moe.convert.command_text import byte_size, whole_numbers
from gpt4moe.convert.from_huggingface import Upcycling, from_huggingface
from gpt4moe.convert.huggingface import DTYPES, to_huggingface
from gpt4moe.convert.inference_layout import to_inference_layout
from gpt4moe.convert.prompts import read_prompts
from gpt4moe.convert.verify import DIFFERENCES, LOGITS_TOLERANCE, Logits, require_speakers, verify, verify_logits
from gpt4moe.errors import ConversionError

Answer = dict[str, Any]

_HELP = {
    "to-hf": "export a checkpoint in Hugging Face format (Mixtral or Qwen3-MoE; Llama or Qwen3 without experts)",
    "from-hf": f"make a step folder for checkpoint.load from a {known_names()} folder",
    "to-inference": "cut a checkpoint into one file a rank",
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
        command.add_argument("--json", action="store_true", help="the answer as JSON")
    for name in ("to-hf", "to-inference"):
        of[name].add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="default bf16")
        of[name].add_argument("--dry-run", action="store_true", help="only say what would be written")
    of["to-hf"].add_argument("--max-shard-size", type=byte_size, default="5GB", metavar="SIZE", help="default 5GB")
    of["to-hf"].add_argument("--tokenizer", type=Path, help="the run's tokenizer.json, where it has moved")
    of["to-hf"].add_argument("--licence", default="apache-2.0", help="for the model card (default apache-2.0)")
    of["from-hf"].add_argument("--upcycle-experts", type=int, metavar="N", help="make a dense model a mixture of N")
    of["from-hf"].add_argument("--upcycle-top-k", type=int, metavar="K", help="experts a token (default 2)")
    of["from-hf"].add_argument("--upcycle-noise", type=float, help="on copies, in init_std (default 0)")
    of["from-hf"].add_argument("--seed", type=int, dest="upcycle_seed", help="of new routers and noise (1234)")
    for axis in ("tp", "pp"):
        of["to-inference"].add_argument(f"--{axis}", type=int, required=True)
    of["to-inference"].add_argument("--layers-per-stage", type=whole_numbers, metavar="N,N,...", help="default: even")
    of["verify"].add_argument("--tolerance", type=tolerance, default=0.0, help="largest |a - b| of a weight (0)")
    of["verify"].add_argument("--prompts", type=Path, help="compare logits too, on the lines of this file")
    of["verify"].add_argument("--logits-tolerance", type=tolerance, default=LOGITS_TOLERANCE, help="default 1e-4")
    return whole


def answered(given: argparse.Namespace, logits: Logits) -> Answer:
    """Does what the options say. Raises: Gpt4MoeError."""
    begin = time.perf_counter()
    answer = _CALLS[given.command](given, logits)
    return {"dry_run": False} | answer | {"seconds": time.perf_counter() - begin}


def lines(given: argparse.Namespace, answer: Answer) -> list[str]:
    """The answer for people."""
    is_verify = given.command == "verify"
    return list((command_text.verification_lines if is_verify else command_text.conversion_lines)(answer))


def status(answer: Answer) -> int:
    """1 when a comparison found a difference."""
    return int(any(answer.get(key) for key in DIFFERENCES) or bool(answer.get("logits", {}).get("different")))


def _to_hf(given: argparse.Namespace, logits: Logits) -> Answer:
    answer = to_huggingface(
        given.checkpoint, given.out, dtype=given.dtype, max_shard_bytes=given.max_shard_size,
        tokenizer=given.tokenizer, licence=given.licence, dry_run=given.dry_run,
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


def _to_inference(given: argparse.Namespace, logits: Logits) -> Answer:
    answer = to_inference_layout(
        given.checkpoint, given.out, tp=given.tp, pp=given.pp, layers_per_stage=given.layers_per_stage,
        dtype=given.dtype, dry_run=given.dry_run,
    )  # fmt: skip
    return answer | {"dry_run": given.dry_run}


def _verify(given: argparse.Namespace, logits: Logits) -> Answer:
    prompts = None
    if given.prompts is not None:
        require_speakers(given.a, given.b)
        prompts = read_prompts(given.prompts, [given.a, given.b])
    answer = verify(given.a, given.b, tolerance=given.tolerance)
    if prompts is not None:
        answer["logits"] = verify_logits(
            given.a, given.b, prompts, logits,
            is_rounded=answer["rounded_to_bf16"], tolerance=given.logits_tolerance,
        )  # fmt: skip
    return answer


_CALLS: dict[str, Callable[[argparse.Namespace, Logits], Answer]] = {
    "to-hf": _to_hf, "from-hf": _from_hf, "to-inference": _to_inference, "verify": _verify,
}  # fmt: skip
