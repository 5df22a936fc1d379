"""Where is a file tested?

  python -m tests.where gpt4moe/moe/dispatch.py      # the tests of one file, nearest first
  python -m tests.where                              # every file, one line each

The nearest test is tests/<room>/test_<file>.py. Next come the tests that import the file, then those that import a file
which imports it.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
THROUGH = {
    "gpt4moe/drill/planted.py": "tests/drill/test_drill.py",
    "gpt4moe/drill/preload.py": "tests/drill/test_drill.py",
    "gpt4moe/drill/rank.py": "tests/drill/test_drill.py",
    "gpt4moe/fork_ranks.py": "tests/test_launch_ranks.py",
    "gpt4moe/gpu_rehearsal/gpu_kernels.py": "tests/gpu_rehearsal/test_steps.py",
    "gpt4moe/model/cross_entropy_kernels.py": "tests/model/test_triton_kernels.py",
    "gpt4moe/model/rotary_kernels.py": "tests/model/test_triton_kernels.py",
    "gpt4moe/moe/routers/softmax_kernels.py": "tests/moe/test_softmax_choice.py",
    "gpt4moe/proof/preload.py": "tests/proof/test_command.py",
    "gpt4moe/refinement/checker.py": "tests/refinement/test_outside.py",
    "gpt4moe/rehearsal/preload.py": "tests/rehearsal/test_rehearsal.py",
    "gpt4moe/runlog/wandb_workspace.py": "tests/runlog/test_dashboard.py",
}
"""Files that a test reaches only through a command or another process, and that test."""


@cache
def imports(file: Path) -> frozenset[str]:
    """Dotted names that a file imports from this repository; `from a import b` counts as a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(name for name in names if name.split(".")[0] in ("gpt4moe", "tests"))


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def files(folder: str) -> tuple[Path, ...]:
    return tuple(sorted((ROOT / folder).rglob("*.py")))


def mirror(file: Path) -> Path:
    """The test of the same name: gpt4moe/moe/dispatch.py -> tests/moe/test_dispatch.py."""
    inside = file.relative_to(ROOT / "gpt4moe")
    return ROOT / "tests" / inside.with_name(f"test_{inside.name}")


@cache
def direct_tests(module: str) -> tuple[Path, ...]:
    """Test files that import a module, themselves or through a helper beside them."""
    helpers = {
        module_of(test) for test in files("tests") if not test.name.startswith("test_") and module in imports(test)
    }
    wanted = {module} | helpers
    return tuple(test for test in files("tests") if test.name.startswith("test_") and wanted & imports(test))


def tests_of(file: Path) -> Iterator[Path]:
    """Test files of a file, nearest first; empty: nothing tests it, not even by way of one file between."""
    found: dict[Path, None] = {}
    if mirror(file).exists():
        found[mirror(file)] = None
    module = module_of(file)
    found |= dict.fromkeys(direct_tests(module))
    if not found:
        users = [user for user in files("gpt4moe") if module in imports(user)]
        tests = [test for user in users for test in (mirror(user), *direct_tests(module_of(user)))]
        through = THROUGH.get(file.relative_to(ROOT).as_posix())
        found |= dict.fromkeys(test for test in [*tests, *([ROOT / through] if through else [])] if test.exists())
    yield from found


def main(arguments: list[str]) -> int:
    asked = [Path(argument).resolve() for argument in arguments] or [
        file for file in files("gpt4moe") if file.name != "__init__.py"
    ]
    wrong = [file for file in asked if file not in files("gpt4moe")]
    if wrong:
        sys.stderr.write(f"{wrong[0]} is no file of gpt4moe.\nGive a path such as gpt4moe/moe/dispatch.py.\n")
        return 2
    for file in asked:
        found = [test.relative_to(ROOT).as_posix() for test in tests_of(file)]
        shown = found if arguments else found[:3] + (["..."] if len(found) > 3 else [])
        separator = "\n  " if arguments else " "
        sys.stdout.write(f"{file.relative_to(ROOT)}:{separator}{separator.join(shown) or 'NOTHING'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
