"""Compilers and wandb stay out of a rank until they are asked for, and come then."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.command import SMALL

ROOT = Path(__file__).resolve().parents[1]
LOADED = """
import sys
from gpt4moe.train import main
status = main(sys.argv[1:])
heavy = ("torch._dynamo.convert_frame", "torch._inductor.compile_fx", "wandb", "transformers")
print("status", status, "loaded", [name for name in heavy if name in sys.modules])
"""
COMPILES = """
import sys, warnings
warnings.filterwarnings("ignore")
import gpt4moe, torch, functools
compile_by_torch, calls = torch.compile, []
torch.compile = lambda function, **options: calls.append(function.__name__) or functools.partial(function)
from megatron.core.fusions.fused_bias_geglu import bias_geglu
from gpt4moe.lean_imports import _NoCompilerYet
assert not calls and bias_geglu.__name__ == "bias_geglu", "only decorated"
x = torch.arange(4.0)
assert torch.equal(bias_geglu(torch.zeros(4), x), bias_geglu(torch.zeros(4), x)), "called twice"
assert calls[0] == "bias_geglu" and calls.count("bias_geglu") == 1, f"compiled once, at its first call: {calls}"
assert isinstance(sys.modules["torch._dynamo"], _NoCompilerYet)
assert torch._dynamo.disable(sum) is sum and torch._dynamo.disable()(sum) is sum
torch.compile = compile_by_torch
print(torch.compile(lambda t: t + 1, backend="eager")(x).tolist(), type(sys.modules["torch._dynamo"]).__name__)
import torch._dynamo.config
assert torch._dynamo is sys.modules["torch._dynamo"] and torch._dynamo.config.disable in (True, False)
import wandb
print(wandb.__name__)
"""
SUBMODULE_FIRST = """
import warnings
warnings.filterwarnings("ignore")
import gpt4moe, megatron.core, torch
import torch._dynamo.config  # the way of FakeTensorMode
from torch._dynamo.variables.builder import VariableBuilder
import torch._dynamo.variables as package
print(torch._dynamo.variables is package, package.builder.VariableBuilder is VariableBuilder)
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_a_run_compiles_nothing_and_loads_no_compiler(engine: str, tmp_path: Path) -> None:
    where = (f"run.root={tmp_path}", "run.name=x", f"engine={engine}", "training.steps=2", "parallel.recompute=full")
    assert "status 0 loaded []" in python(LOADED, *SMALL, *where)


def test_what_is_decorated_is_compiled_once_when_it_is_called_and_the_compiler_is_torchs() -> None:
    assert python(COMPILES).splitlines() == ["[1.0, 2.0, 3.0, 4.0] module", "wandb"]


def test_no_module_of_the_compiler_is_there_twice() -> None:
    assert python(SUBMODULE_FIRST).split() == ["True", "True"]
