"""The C++ guard is built once, and what is missing is said in two lines."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gpt4moe.errors import LaunchError
from gpt4moe.gpu_rehearsal import guard
from tests.gpu_rehearsal.cases import CUDA_BUILD

ROOT = Path(__file__).parents[2]


def test_it_is_built_once() -> None:
    first = guard.build(guard.torch_folder())
    assert guard.build(guard.torch_folder(), compiler="no-compiler") == first and first.stat().st_size > 0


def test_without_a_compiler_the_cure_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(LaunchError, match=r"no-compiler is missing.* C\+\+ once") as caught:
        guard.build(guard.torch_folder(), compiler="no-compiler")
    assert caught.value.exit_code == 2 and "apt-get install" in caught.value.cure


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(LaunchError, match=r"cannot compile guard\.cpp against torch"):
        guard.build(tmp_path)  # no torch there
    assert list(tmp_path.rglob("*.so")) == []


def test_a_folder_or_a_library_that_cannot_be_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"gpt4moe-gpu-rehearsal-{os.getuid()}"
    folder.touch()
    with pytest.raises(LaunchError, match=r"folder cannot be made: .*exists") as caught:
        guard.build(guard.torch_folder())
    assert "TMPDIR" in caught.value.cure
    with pytest.raises(LaunchError, match=r"cannot be loaded: .*too short") as caught:
        guard._install(folder)
    assert f"Remove {folder}" in caught.value.cure


@pytest.mark.skipif(guard.is_cuda_build(guard.torch_folder()), reason=CUDA_BUILD)
def test_the_tool_says_in_two_lines_that_the_compiler_is_missing(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "tools/rehearse_gpu.py", "+experiment=tiny", "precision=bf16"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert [line[:4] for line in done.stderr.splitlines()] == ["erro", "fix:"] and "g++ is missing" in done.stderr


def test_a_cuda_build_of_torch_is_refused(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u\n"
        "from types import SimpleNamespace\n"
        f"u.find_spec = lambda name: SimpleNamespace(origin='{tmp_path}/torch/__init__.py')\n"
        "from gpt4moe.gpu_rehearsal import guard\n"
        "guard.load()"
    )
    (tmp_path / "torch/lib").mkdir(parents=True)
    (tmp_path / "torch/lib/libtorch_cuda.so").touch()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "LaunchError" in done.stderr and "is a CUDA build" in done.stderr
