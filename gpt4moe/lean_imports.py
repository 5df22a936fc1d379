"""Megatron and DeepSpeed imported without what no step uses: torch's compiler and wandb, a third of a rank's imports.

Their modules decorate functions with torch.compile, which loads torch._dynamo and torch._inductor; Megatron's inference
engine imports wandb. Here a decorated function is compiled when it is first called (none is on CPUs, Megatron's fusions
on GPUs are), wandb is left to those who log, and torch._dynamo is a stand-in until it is asked for more than the
optimizers and process groups of torch ask. `python -m benchmarks.startup` prints the CPU seconds with and without.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

COMPILER = "torch._dynamo"
LEAN = ("megatron.core", "deepspeed.runtime.zero.muon.original_muon")
"""Whoever imports these, imports the rest that decorates."""


def install() -> None:
    """From now on LEAN are imported so; nothing is imported now."""
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.startswith(f"{COMPILER}.") and name in sys.modules:
            # Asking the stand-in for its __path__ brought the whole package, this module too: not a second time.
            return ModuleSpec(name, _Loaded(sys.modules[name]))
        if name not in LEAN:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loaded(Loader):
    """A module that is there, as if it had just been loaded."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        with suppress(AttributeError):  # torch's modules of settings take no other name; they have their own spec still
            module.__spec__ = self.spec


class _Loader(Loader):
    def __init__(self, real: Loader) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec)

    def __getattr__(self, name: str) -> Any:  # get_source, get_resource_reader
        return getattr(self.real, name)

    def exec_module(self, module: ModuleType) -> None:
        if COMPILER not in sys.modules:
            sys.modules[COMPILER] = _NoCompilerYet(COMPILER)
        with _compiled_when_called(), _without("wandb"):
            self.real.exec_module(module)


@contextmanager
def _compiled_when_called() -> Iterator[None]:
    """megatron.core.jit takes torch.compile for its decorator when it is imported, and keeps what it finds."""
    import torch

    real = torch.compile
    torch.compile = functools.partial(_at_first_call, real)
    try:
        yield
    finally:
        torch.compile = real


def _at_first_call(compiler: Callable[..., Any], function: Any = None, **options: Any) -> Any:
    if not callable(function) or isinstance(function, type):
        return compiler(function, **options)
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if not compiled:
            compiled.append(compiler(function, **options))
        return compiled[0](*arguments, **keywords)

    return call


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Importing it fails meanwhile, unless somebody has it already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


class _NoCompilerYet(ModuleType):
    """What torch's optimizers and process groups ask of torch._dynamo, while nothing is compiled.

    Any other name, a module of its package too, brings the real one.
    """

    trace_rules = SimpleNamespace(clear_lru_cache=lambda: None)

    @staticmethod
    def graph_break(msg: str = "") -> None:
        """No graph, no break."""

    @staticmethod
    def disable(fn: Any = None, recursive: bool = True, *, reason: str | None = None, wrapping: bool = True) -> Any:
        """A function that is not to be traced, as it is; without one, a decorator that does so."""
        return (lambda function: function) if fn is None else fn

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(COMPILER) is self:
            if name in ("__spec__", "__file__", "__wrapped__"):  # asked by inspect and importlib of every module
                raise AttributeError(name)
            del sys.modules[COMPILER]
        return getattr(importlib.import_module(COMPILER), name)
