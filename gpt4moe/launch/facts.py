"""Facts of a rank's machine: versions, memory, its GPU."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

import gpt4moe

PACKAGES = ("torch", "megatron-core", "deepspeed", "numpy", "safetensors")
PACKAGE_FOLDER = Path(gpt4moe.__file__).parent
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """The GPU that this rank uses."""

    name: str
    identity: str
    """The device's unique id. Two ranks with the same identity share the GPU."""
    memory_bytes: int
    free_bytes: int
    """Free memory before this run uses any. If it is much less than the total, another process uses the GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFacts:
    """Facts of one rank's machine."""

    host: str
    versions: dict[str, str]
    available_bytes: int
    """Host memory that is free while this process runs: of the node, or below the job's limit if that is less."""
    gpu: Gpu | None


def rank_facts(local_rank: int, variables: Mapping[str, str] = os.environ) -> RankFacts:
    """Reads the facts without communication."""
    gpu, cuda = _gpu(local_rank)
    return RankFacts(
        host=variables.get("SLURMD_NODENAME") or platform.node(),
        versions=_versions() | cuda,
        available_bytes=min(psutil.virtual_memory().available, _job_limit()),
        gpu=gpu,
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"gpt4moe": f"{gpt4moe.__version__} {_commit()}", "gpt4moe's source": source_hash(PACKAGE_FOLDER)}


def source_hash(folder: Path) -> str:
    """Hash of all Python files. It shows a checkout that was edited, or not updated, on one node."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _commit() -> str:
    command = ["git", "-C", str(PACKAGE_FOLDER), "rev-parse", "--short=12", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "commit unknown"
    return answer.stdout.strip() or "commit unknown"


def _gpu(local_rank: int) -> tuple[Gpu | None, dict[str, str]]:
    """The GPU that parallel.groups.world would choose. Reading the facts allocates only a context on it."""
    import torch

    if not torch.cuda.is_available():
        return None, {}
    index = local_rank % torch.cuda.device_count()
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    gpu = Gpu(
        name=properties.name,
        identity=str(getattr(properties, "uuid", f"device {index}")),
        memory_bytes=total,
        free_bytes=free,
    )
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    driver = next(iter(_DRIVER.read_text().splitlines()), "") if _DRIVER.exists() else "unknown"
    return gpu, {"CUDA": str(torch.version.cuda), "NCCL": nccl, "driver": driver}


# Controller -> its folder below the mount, limit and use: of control groups version 2 (no controller named), and 1.
_MEMORY_FILES = {
    "": ("", "memory.max", "memory.current"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}
_NO_LIMIT = 1 << 60
"""Version 1 writes the largest number of pages if there is no limit."""


def _job_limit(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> float:
    """Memory that the control groups of this process still allow; infinite if they have no limit."""
    if not groups.exists():
        return float("inf")
    left = float("inf")
    for line in groups.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        found = next((files for name, files in _MEMORY_FILES.items() if name in controllers.split(",")), None)
        if found is None:
            continue
        root = mount / found[0]
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            limit, used = place / found[1], place / found[2]
            if not (place.is_relative_to(root) and limit.exists() and used.exists()):
                continue
            most = limit.read_text().strip()
            if most != "max" and int(most) < _NO_LIMIT:
                left = min(left, int(most) - int(used.read_text()))
    return left
