"""What is tried: for each kind of input the files that may be damaged, and the commands that read them."""

import importlib.util
import string
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from gpt4moe.config.load import config_to_dict, load_run_config
from tests.fuzz.damage import Damage, damages
from tests.fuzz.worlds import CHECKPOINT, SMALL

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "train"
"""Not a tool: gpt4moe.train, up to the moment when the ranks would meet."""
COMMON = ("tokenizer.json",)


@dataclass(frozen=True)
class Kind:
    """Damaged files of one kind, and who reads them."""

    files: str
    """The files that may be damaged: a glob below the world."""
    commands: tuple[tuple[str, ...], ...]
    """Each: a tool, and its arguments."""
    needs: tuple[str, ...] = COMMON
    """Copied for each case, beside the damaged ones."""
    statuses: tuple[int, ...] = (0, 2)
    """What the commands may end with beside it: 1, where they look for damage."""


RESUME = (TRAIN, *SMALL, "run.name=first")
MAKE = ("--tokenizer", "tokenizer.json", "--out", "out", "--held-out", "0.2", "--source")
KINDS: dict[str, Kind] = {
    "dataset": Kind("data/**/*", (
        (TRAIN, *SMALL, "run.name=new"), ("mixture", "show", *SMALL, "run.name=new"), ("mixture", "verify", "data"),
        ("mixture", "sample", "0", *SMALL),
        ("tokenize_corpus", "--out", "data", "--held-out", "0.2", "--source", "more=texts/a.jsonl"),
    ), ("data", "texts", *COMMON), (0, 1, 2)),
    "text": Kind("texts/*", (
        ("tokenize_corpus", *MAKE, "a=texts/a.jsonl"),
        ("tokenize_corpus", *MAKE, "a=texts"),
    ), ("texts", *COMMON)),
    "checkpoint": Kind("ckpt/*", (
        ("inspect_checkpoint", "ls", "."), ("inspect_checkpoint", "show", "ckpt", "--tensors"),
        ("inspect_checkpoint", "verify", "ckpt"), ("inspect_checkpoint", "diff", "ckpt", CHECKPOINT),
        ("convert_checkpoint", "to-hf", "ckpt", "out", "--tokenizer", "tokenizer.json"),
        ("convert_checkpoint", "to-inference", "ckpt", "out", "--tp", "2", "--pp", "1"),
        ("convert_checkpoint", "verify", "ckpt", "hf"), (TRAIN, *SMALL, "run.name=new", "checkpoint.load=ckpt"),
    ), ("ckpt", "runs", "hf", "data", *COMMON), (0, 1, 2)),
    "adapters": Kind("adapters/*", (
        ("inspect_checkpoint", "show", "adapters", "--tensors"), ("inspect_checkpoint", "verify", "adapters"),
        ("convert_checkpoint", "merge", "adapters", "out"),
        ("convert_checkpoint", "to-hf", "adapters", "out", "--tokenizer", "tokenizer.json"),
        ("convert_checkpoint", "to-peft", "adapters", "out", "--model", "hf"),
    ), ("adapters", "ckpt", "hf", *COMMON), (0, 1, 2)),
    "run folder": Kind("runs/first/**/*", (
        ("runs",), ("runs", "show", "first", "--json"), ("runs", "runs/first"), RESUME,
        ("inspect_checkpoint", "ls", "runs/first"), ("inspect_checkpoint", "verify", "runs/first"),
        ("plan", *SMALL, "run.name=x", "calibrate=runs/first"),
    ), ("runs", "data", *COMMON), (0, 1, 2)),
    "Hugging Face folder": Kind("hf/*", (
        ("convert_checkpoint", "from-hf", "hf", "out"), ("convert_checkpoint", "verify", "hf", "ckpt"),
        ("convert_checkpoint", "to-peft", "adapters", "out", "--model", "hf"),
        ("convert_checkpoint", "from-hf", "hf", "out", "--upcycle-experts", "4"),
    ), ("hf", "ckpt", "adapters", *COMMON), (0, 1, 2)),
    "inference folder": Kind("inference/*", (
        ("convert_checkpoint", "verify", "inference", "ckpt"), ("convert_checkpoint", "verify", "hf", "inference"),
    ), ("inference", "ckpt", "hf", *COMMON), (0, 1, 2)),
    "image": Kind("media/*", tuple(
        ("prepare_media", *MAKE, f"a=media/{what}", *more)
        for what in ("pairs.jsonl", "a.tar") for more in ((), ("--max-bad", "0.3"), ("--bad-rows", "skip"))
    ), ("media", *COMMON)),
    "chat file": Kind("chat/*", tuple(
        ("prepare_chat", *MAKE, "a=chat/a.jsonl", *more)
        for more in ((), ("--bad-rows", "skip"))
    ), ("chat", *COMMON)),
    "tokenizer": Kind("tokenizer.json", (
        ("tokenize_corpus", *MAKE, "a=texts/a.jsonl"),
        ("prepare_chat", *MAKE, "a=chat/a.jsonl"),
        ("prepare_media", *MAKE, "a=media/pairs.jsonl"),
        ("convert_checkpoint", "to-hf", "ckpt", "out", "--tokenizer", "tokenizer.json"),
    ), ("texts", "chat", "media", "ckpt", *COMMON)),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One try."""

    kind: str
    tool: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = COMMON
    statuses: tuple[int, ...] = (0, 2)
    damages: tuple[Damage, ...] = ()

    def describe(self) -> str:
        damages = ", ".join(repr(damage)[:160] for damage in self.damages)
        return f"{self.tool} {' '.join(map(repr, self.arguments))} {damages}"


def cases(kind: str, world: Path) -> st.SearchStrategy[Case]:
    """The cases of a kind."""
    if kind == "configuration":
        return _configurations()
    if kind == "command line":
        return _command_lines()
    row = KINDS[kind]
    files = sorted(path.relative_to(world).as_posix() for path in world.glob(row.files) if path.is_file())
    damaged = st.lists(damages(files), min_size=1, max_size=2)
    return st.builds(
        lambda command, done: Case(kind, command[0], command[1:], row.needs, row.statuses, tuple(done)),
        st.sampled_from(row.commands), damaged,
    )  # fmt: skip


ALL = ("configuration", "command line", *KINDS)
_VALUES = (
    "", "null", "true", "-1", "0", "1", "0.5", "1e400", "-1e9", "nan", "inf", "-inf", "99999999999999999999", "1e8",
    "abc", "'a b'", "[]", "{}", "[1]", "{a: 1}", "[[1,2],[3]]", "???", "${run.name}", "${nothing}", "${oc.env:HOME}",
    "$(touch made)", "`touch made`", "../x", "/etc/passwd",
    "'", '"', "[", "{", "a=b", "é", "\u202e", "\0x", "a\nb", "-rf",
    "!!python/object/apply:os.system", "0x10", "1_000", "100000000", "x" * 5000, "'\\ud800'",
)  # fmt: skip


def _keys(tree: dict[str, Any], path: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{path}{key}.")


def _words() -> st.SearchStrategy[str]:
    return st.text(st.sampled_from(string.printable + "é\u202e\x00\x1b"), max_size=12)


def _configurations() -> st.SearchStrategy[Case]:
    run = load_run_config([*SMALL, "run.name=first"])
    keys = sorted(_keys(config_to_dict(run)))
    groups = ["model", "data", "parallel", "precision", "engine", "router@model.moe.router", "stage", "experiment"]
    groups += ["cluster", "router"]
    key = st.one_of(st.sampled_from(keys), st.sampled_from(keys), st.sampled_from(groups), st.builds(
        lambda name, at, letter: name[:at] + letter + name[at + 1 :], st.sampled_from(keys), st.integers(0, 20),
        _words(),
    ))  # fmt: skip
    override = st.builds(
        lambda sign, name, value: f"{sign}{name}={value}" if value is not None else f"{sign}{name}",
        st.sampled_from(("", "", "", "+", "++", "~")), key,
        st.one_of(st.sampled_from(_VALUES), _words(), st.none()),
    )  # fmt: skip
    readers = (TRAIN, TRAIN, "plan", "show_schedule")
    return st.builds(
        lambda tool, more: Case("configuration", tool, (*SMALL, "run.name=new", *more), ("data",), (0, 1, 2)),
        st.sampled_from(readers), st.lists(override, min_size=1, max_size=2),
    )  # fmt: skip


_PATHS = (
    "ckpt", "hf", "runs", "runs/first", "inference", "data", "tokenizer.json", "nothing", "", "/", "..", "/dev/null",
    "/proc/self/mem", "a\nb", "x" * 300, "\0", "-", "--", "ckpt/manifest.json",
)  # fmt: skip
_FLAGS = (
    "--out", "--tokenizer", "--source", "--tp", "--pp", "--json", "--dtype", "--tolerance", "--held-out", "--base",
    "--max-shard-size", "--layers-per-stage", "--upcycle-experts", "--upcycle-noise", "--prompts", "--tensors",
    "--valid", "--licence", "--bad-rows", "--vocab-size", "--max-bad", "--max-pixels", "--workers", "--field",
    "--train-tokenizer", "--processes", "--fim", "--suffixes", "--colour", "--dry-run", "--template", "--images",
    "--decontaminate", "--seed",
)  # fmt: skip
_FIRST: dict[str, tuple[str, ...]] = {
    "convert_checkpoint": ("to-hf", "from-hf", "to-inference", "verify", "merge", "to-peft", "to-idefics", "x", ""),
    "inspect_checkpoint": ("ls", "show", "verify", "diff", "x"), "mixture": ("show", "sample", "step", "verify",
    "register", "x"), "runs": ("show", "runs", "x"), "tokenize_corpus": ("--out=out",), "prepare_chat": ("--out=out",),
    "prepare_media": ("--out=out",), "plan": ("report=inference", "serve", "gpus=8", "search=true", "x"),
    "show_schedule": ("ranks=4", "output=svg", "x"), "dashboard": ("check", "push", "x"), TRAIN: ("run.name=new", "x"),
}  # fmt: skip


def _command_lines() -> st.SearchStrategy[Case]:
    value = st.one_of(st.sampled_from(_PATHS), st.sampled_from(_VALUES), _words())
    flag = st.one_of(st.sampled_from(_FLAGS), st.builds("{}={}".format, st.sampled_from(_FLAGS), value))
    words = st.lists(st.one_of(flag, value, st.sampled_from(("a=texts/a.jsonl", "a=chat/a.jsonl"))), max_size=6)
    needs = ("ckpt", "hf", "runs", "texts", "chat", *COMMON)
    return st.sampled_from(sorted(_FIRST)).flatmap(
        lambda tool: st.builds(
            lambda first, more: Case("command line", tool, (first, *more), needs, (0, 1, 2)),
            st.sampled_from(_FIRST[tool]),
            words,
        )
    )


@cache
def command(tool: str) -> Callable[[list[str]], int]:
    """The tool's main; of TRAIN the launch alone: nothing is trained."""
    if tool == TRAIN:
        from gpt4moe import train

        train.train = lambda launch, environment, probes: 0  # type: ignore[assignment]
        return train.main
    spec = importlib.util.spec_from_file_location(f"fuzzed_{tool}", ROOT / "tools" / f"{tool}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main  # type: ignore[no-any-return]
