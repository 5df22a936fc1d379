"""The house rules, held by `ast`: imports go down, each third-party package has its file, files stay small.

Each check takes a source string, so that a planted violation shows it can fail (the lower half of this file).
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import gpt4moe
from tests import where

ROOT = Path(__file__).resolve().parents[1]
STOREYS = {
    "errors": -1, "durable": -1, "lean_imports": -1, "config": 0, "parallel": 1,
    "architecture": 2, "pipeline": 2, "moe": 2, "data": 2,
    "planner": 3, "chat": 3, "objectives": 3, "model": 3, "corpus": 3, "media": 3, "checkpoint": 4, "resilience": 4,
    "runlog": 4,
    "pages": 5, "operations": 5, "training": 5, "inference": 5, "convert": 5, "launch": 5, "demo": 6, "proof": 6,
    "rehearsal": 6, "gpu_rehearsal": 6, "evaluation": 6, "serving": 6, "train": 7, "launch_ranks": 7,
    "refinement": 7, "fork_ranks": 8, "drill": 8,
}  # fmt: skip
# Rooms that may import less than everything below them (errors, durable and config are open to all).
NARROW = {
    "errors": set(), "durable": set(), "architecture": {"parallel"}, "pipeline": {"parallel"},
    "planner": {"architecture", "pipeline", "parallel"}, "data": {"parallel"},
    "model": {"architecture", "moe", "parallel"}, "checkpoint": {"architecture", "data", "parallel"},
    "resilience": {"parallel"},
    "runlog": {"moe", "parallel"}, "pages": {"runlog", "planner", "pipeline", "parallel"},
    "operations": {"runlog", "checkpoint"},
    "objectives": {"data"}, "corpus": {"data"}, "media": {"data"},
    "training": {
        "architecture", "model", "moe", "objectives", "data", "checkpoint", "resilience", "runlog", "parallel",
    },
    "chat": {"data"},
    "inference": {"model", "architecture", "chat", "checkpoint", "parallel", "data"},
    "convert": {"model", "architecture", "chat", "checkpoint", "parallel", "data"},
    "evaluation": {"inference", "convert", "model", "architecture", "checkpoint", "parallel", "data", "runlog"},
    "refinement": {"inference", "evaluation", "convert", "pages", "runlog", "data", "parallel"},
    "serving": {"inference", "convert", "checkpoint", "parallel", "runlog"},
    "launch": {"planner", "architecture", "parallel", "data", "checkpoint"},
}  # fmt: skip
THIRD_PARTY = {
    "megatron.core.parallel_state": ["gpt4moe/parallel/megatron_state.py"],
    "deepspeed.utils.groups": ["gpt4moe/parallel/deepspeed_groups.py", "gpt4moe/training/engine*.py"],
    "deepspeed.initialize": ["gpt4moe/parallel/deepspeed_groups.py", "gpt4moe/training/engine*.py"],
    "wandb": ["gpt4moe/runlog/wandb_run.py"], "wandb_workspaces": ["gpt4moe/runlog/wandb_workspace.py"],
    "starlette": ["gpt4moe/serving/http.py"], "uvicorn": ["gpt4moe/serving/http.py"],
    "hydra": ["gpt4moe/config/load.py", "gpt4moe/config/compose.py"],
    "omegaconf": ["gpt4moe/config/load.py", "gpt4moe/config/compose.py"],
    "orjson": ["gpt4moe/corpus/records.py", "gpt4moe/runlog/metrics_log.py"], "pyarrow": ["gpt4moe/corpus/records.py"],
    "zstandard": ["gpt4moe/corpus/compressed.py"],
    "gigatoken": ["gpt4moe/corpus/encoder.py"], "sentencepiece": ["gpt4moe/corpus/foreign.py"],
    "tiktoken": ["gpt4moe/corpus/foreign.py"],
    "PIL": ["gpt4moe/data/pictures.py", "gpt4moe/demo/pictures/*.py"], "webdataset": ["gpt4moe/media/tars.py"],
    "lm_eval": ["gpt4moe/evaluation/harness.py"],
    "triton": [
        "gpt4moe/model/cross_entropy_kernels.py", "gpt4moe/model/rotary_kernels.py", "gpt4moe/moe/swiglu_kernels.py",
        "gpt4moe/moe/weight_gradient_kernels.py", "gpt4moe/moe/routers/softmax_kernels.py",
    ],
    "pickle": [], "torch.load": [], "torch.save": [],
}  # fmt: skip
TORCH_FREE = [
    "errors", "durable", "config/*", "parallel/layout", "parallel/placement", "parallel/legality",
    "parallel/support_table",
    "architecture/*", "pipeline/*", "planner/*", "moe/statistics", "runlog/[!w]*", "operations/*", "launch/checks_*",
    "convert/[!p]*", "convert/pr*", "convert/pu*", "corpus/*",
]  # fmt: skip


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that is imported, `from a import b` as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides the room it comes from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain on a plain name, else nothing."""
    if isinstance(node, ast.Attribute):
        parent = dotted(node.value)
        return f"{parent}.{node.attr}" if parent else ""
    return node.id if isinstance(node, ast.Name) else ""


def downward(source: str, path: str) -> Iterator[str]:
    """Imports of a room that this one may not use: above it, beside it, or outside its own list."""
    room = Path(path).with_suffix("").parts[1]
    if room == "__init__":
        allowed = {"lean_imports"}
    else:
        below = {other for other, storey in STOREYS.items() if storey < STOREYS[room]}
        allowed = {room, "errors", "durable", "config"} | (below & NARROW.get(room, below))
    for name in imported_names(ast.parse(source)):
        parts = name.split(".")
        if parts[0] == "gpt4moe" and parts[1:] and parts[1] not in allowed | {"__version__"}:
            yield f"{path}: {room} may not import {name}"


def third_party(source: str, path: str) -> Iterator[str]:
    tree = ast.parse(source)
    imported = set(imported_names(tree))
    roots = {name.split(".")[0] for name in imported}
    names = imported | {name for name in map(dotted, ast.walk(tree)) if name.split(".")[0] in roots}
    for package, owners in THIRD_PARTY.items():
        if any(name == package or name.startswith(package + ".") for name in names) and not any(
            fnmatch(path, owner) for owner in owners
        ):
            yield f"{path}: {package} belongs to {' and '.join(owners) or 'nobody'}"


def shape(source: str, path: str) -> Iterator[str]:
    """Sizes and names, `global`, and `.cuda()` (the device is an argument)."""
    limit = 60 if path.startswith("tools/") else 300
    if len(source.splitlines()) > limit:
        yield f"{path}: {len(source.splitlines())} lines, more than {limit}"
    if Path(path).stem in ("utils", "helpers", "common", "misc"):
        yield f"{path}: the name says nothing about what is inside"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if (node.end_lineno or 0) - node.lineno + 1 > 60:
                yield f"{path}:{node.lineno}: {node.name} is longer than 60 lines"
        elif isinstance(node, ast.Global):
            yield f"{path}:{node.lineno}: global"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            yield f"{path}:{node.lineno}: .cuda()"


def violations(check: Callable[[str, str], Iterator[str]], *folders: str) -> list[str]:
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return [wrong for file in files for wrong in check(file.read_text(), file.relative_to(ROOT).as_posix())]


def test_imports_only_go_down() -> None:
    assert violations(downward, "gpt4moe") == []


def test_third_party_names_stay_in_their_files() -> None:
    assert violations(third_party, "gpt4moe", "tools") == []


def test_files_and_functions_stay_small_and_well_named() -> None:
    assert violations(shape, "gpt4moe", "tools", "tests", "benchmarks") == []


def test_what_needs_no_torch_imports_no_torch() -> None:
    files = [file for glob in TORCH_FREE for file in sorted((ROOT / "gpt4moe").glob(f"{glob}.py"))]
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    assert len(modules) > 10
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert {"torch", "megatron", "deepspeed"}.isdisjoint(result.stdout.split())


def test_the_map_lists_every_room_on_its_storey() -> None:
    rows = re.findall(r"^    (\d)  (\w+)(?:\.py)? ", gpt4moe.__doc__ or "", re.MULTILINE)
    rooms = {path.stem for path in (ROOT / "gpt4moe").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {room for _, room in rows} == rooms | {"train", "launch_ranks", "fork_ranks"}
    assert {room: int(storey) for storey, room in rows} == {
        room: storey for room, storey in STOREYS.items() if storey >= 0
    }


def test_a_room_s_sign_names_every_file_of_it() -> None:
    """A file in a folder of files of one kind (routers, callbacks) may be named by its folder."""
    unnamed = [
        file.relative_to(ROOT).as_posix()
        for sign in (ROOT / "gpt4moe").glob("*/__init__.py")
        for file in sign.parent.rglob("*.py")
        if file.name != "__init__.py" and not {file.name, f"{file.parent.name}/"} & set(sign.read_text().split())
    ]
    assert unnamed == []


def test_every_file_has_a_test_that_can_be_found() -> None:
    """`python -m tests.where FILE` prints it."""
    untested = [path for path in where.files("gpt4moe") if path.name != "__init__.py" and not [*where.tests_of(path)]]
    assert untested == []
    named = [ROOT / path for pair in where.THROUGH.items() for path in pair]
    assert [path for path in named if not path.exists()] == []


@pytest.mark.parametrize(
    ("check", "path", "source"),
    [
        (downward, "gpt4moe/moe/layer.py", "from gpt4moe.model import specs"),
        (downward, "gpt4moe/moe/layer.py", "from gpt4moe.data.batch import Batch"),
        (downward, "gpt4moe/model/gpt.py", "def f():\n    import gpt4moe.data.batch"),
        (downward, "gpt4moe/demo/story.py", "from gpt4moe.proof.prove import prove"),
        (downward, "gpt4moe/__init__.py", "from gpt4moe.errors import ConfigError"),
        (third_party, "gpt4moe/moe/layer.py", "from megatron.core import parallel_state as mpu"),
        (third_party, "gpt4moe/moe/layer.py", "import deepspeed\ndeepspeed.initialize(model=1)"),
        (third_party, "gpt4moe/training/loop.py", "import wandb"),
        (third_party, "tools/inspect_checkpoint.py", "import torch\nx = torch.load('file')"),
        (shape, "gpt4moe/moe/layer.py", "x = 1\n" * 301),
        (shape, "tools/plan.py", "x = 1\n" * 61),
        (shape, "gpt4moe/moe/layer.py", "def f():\n" + "    x = 1\n" * 60),
        (shape, "gpt4moe/moe/utils.py", ""),
        (shape, "gpt4moe/moe/layer.py", "def f():\n    global x"),
        (shape, "gpt4moe/moe/layer.py", "x.cuda()"),
    ],
)
def test_a_planted_violation_is_found(check: Callable[[str, str], Iterator[str]], path: str, source: str) -> None:
    assert len(list(check(source, path))) == 1
    assert list(check("import torch\nfrom gpt4moe.errors import ConfigError\n", "gpt4moe/train.py")) == []
