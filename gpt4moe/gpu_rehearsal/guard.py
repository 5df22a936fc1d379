"""Builds guard.cpp once and loads it, so that a CPU build of torch runs autograd on fake `cuda` tensors.

guard.cpp --g++, a few seconds--> a library in the temporary folder --load()--> torch may be imported
"""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from gpt4moe.errors import LaunchError

_SOURCE = Path(__file__).with_name("guard.cpp")
_FLAGS = ("-std=c++20", "-O1", "-shared", "-fPIC")


def load() -> None:
    """Loads the library; torch must not be imported yet. A second call changes nothing.

    Raises: LaunchError without a C++ compiler, for a CUDA build of torch, and where the library can be neither made nor
        loaded.
    """
    if _is_loaded():
        return
    assert "torch" not in sys.modules, "the guard must be loaded before torch is imported"
    torch = torch_folder()
    if is_cuda_build(torch):
        raise LaunchError(
            f"torch {version('torch')} is a CUDA build, and the GPU rehearsal needs the CPU build: it registers a "
            "CUDA device of its own, where this torch has one already.",
            "Run it in another virtual environment: pip install torch --index-url "
            "https://download.pytorch.org/whl/cpu, then requirements.txt.",
        )
    # Its symbols must be global: the guard links against them.
    ctypes.CDLL(str(torch / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    _install(build(torch))
    os.environ[_LOADED] = str(os.getpid())
    os.environ["DS_ACCELERATOR"] = "cuda"  # DeepSpeed chooses when it is imported


def _install(library: Path) -> None:
    try:
        ctypes.CDLL(str(library)).install_guard()
    except (OSError, AttributeError) as error:
        raise LaunchError(
            f"The GPU rehearsal's library cannot be loaded: {error}.",
            f"Remove {library}: it is built again. Or set TMPDIR to a folder that is not mounted noexec.",
        ) from error


def torch_folder() -> Path:
    """Where torch is installed, without importing it."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def is_cuda_build(torch: Path) -> bool:
    """Whether the torch of this folder can drive a GPU; also where there is none."""
    return any((torch / "lib").glob("libtorch_cuda*"))


_LOADED = "GPT4MOE_GPU_REHEARSAL_PID"


def _is_loaded() -> bool:
    return os.environ.get(_LOADED) == str(os.getpid())


def _folder() -> Path:
    """Where libraries are kept. Raises: LaunchError where it cannot be made, or belongs to another user."""
    cure = "Set TMPDIR to a folder of your own."
    try:
        folder = Path(tempfile.gettempdir()) / f"gpt4moe-gpu-rehearsal-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise LaunchError(f"The GPU rehearsal's folder cannot be made: {error}.", cure) from error
    if owner != os.getuid():  # another user's library would be loaded
        raise LaunchError(f"{folder} belongs to another user.", cure)
    return folder


def build(torch: Path, *, compiler: str = "g++") -> Path:
    """The library for the torch installed in this folder, built where it is missing.

    Raises: LaunchError when there is no compiler or it fails, and when the temporary folder cannot be used.
    """
    key = hashlib.sha256(f"{_SOURCE.read_text()}{version('torch')}{torch}{_FLAGS}".encode()).hexdigest()[:16]
    library = _folder() / f"guard-{key}.so"
    if library.exists():
        return library
    path = shutil.which(compiler)
    if path is None:
        raise LaunchError(
            f"{compiler} is missing: the GPU rehearsal compiles {len(_SOURCE.read_text().splitlines())} lines of C++ "
            "once, which let autograd run on fake GPU tensors.",
            f"Install {compiler}: apt-get install g++",
        )
    partial = library.with_suffix(f".{os.getpid()}")
    command = [path, *_FLAGS, f"-I{torch / 'include'}", str(_SOURCE), f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(
            f"{compiler} cannot compile {_SOURCE.name} against torch {version('torch')}: "
            f"{next((line for line in done.stderr.splitlines() if 'error' in line), done.stderr[-200:])}",
            "The file is written for torch 2.13 and C++20: use g++ 10 or newer.",
        )
    os.replace(partial, library)  # whole or not there, also with several builds at a time
    return library
