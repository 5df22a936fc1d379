"""A checkpoint is set aside when it is damaged for all, and not when one node alone cannot read it."""

import errno
import os
import re
import shutil
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from gpt4moe.checkpoint.manifest import NAME
from gpt4moe.errors import (
    HEADER,
    MISSING,
    SIZE,
    CheckpointError,
    DamagedCheckpoint,
    Gpt4MoeError,
    LaunchError,
    UnreadableCheckpoint,
)
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.training import fallback
from gpt4moe.training.run_folder import RunFolder
from tests.checkpoint.builders import dealt, flip_bit, state, write_checkpoint
from tests.spawn import run_ranks

FILE, OTHER = "rank-00001.safetensors", LaunchError("Told by rank 1.", "")
DAMAGED = "Block 0 of {} is damaged." + 2000 * " ü\udcff"
"""Longer than a message between ranks, and with a letter that UTF-8 has not."""
CASES: dict[str, tuple[int, bool, bool, str]] = {
    # what rank 1 finds (0: a wrong hash, -1: a right one of impossible bytes), whether the file is so, on a node of its
    # own -> "" set aside, or the cause
    "a flipped bit": (0, True, True, ""),
    "a node's memory": (0, False, True, "Rank 1 on node 1 found it; rank 0 on node 0 reads it well"),
    "a flipped bit on one node": (0, True, False, ""),
    "a node's disk": (errno.EIO, False, True, "Rank 1 on node 1 found it; rank 0 on node 0 reads it well"),
    "a disk of all nodes": (errno.EIO, True, True, ""),
    "the disk of the one node": (errno.EIO, False, False, ""),
    "a stale mount": (errno.ESTALE, False, True, "Rank 1 on node 1 found it; rank 0 on node 0 reads it well"),
    "bytes that cannot be": (-1, False, True, ""),
    "a permission": (errno.EACCES, False, False, "Rank 1 found it, and all ranks are on this node"),
}


def decide(environment: Environment, root: Path) -> dict[str, tuple[bool, str, int]]:
    """Of each case whether this rank steps back; else what it raises, and with which status."""
    found = {}
    with world(environment, timeout=timedelta(minutes=2)) as device:
        groups = cast(
            "ProcessGroups",
            SimpleNamespace(
                rank=environment.rank, device=device, is_first_rank=environment.rank == 0,
                layout=SimpleNamespace(world_size=environment.world_size),
            ),
        )  # fmt: skip
        for case, (number, _, has_nodes, _) in CASES.items():
            fallback._node = f"node {environment.rank if has_nodes else 0}".format
            path = root / case / "checkpoints" / "step-00000004" / FILE
            mine: Gpt4MoeError = OTHER
            if environment.rank == 1 and number < 0:
                mine = DamagedCheckpoint(path.parent, f"The header of {path} is none that was written here.")
            elif environment.rank == 1 and number:
                mine = UnreadableCheckpoint(path, str(path), OSError(number, os.strerror(number)), 0)
            elif environment.rank == 1:
                mine = DamagedCheckpoint(path.parent, DAMAGED.format(path), (FILE, 0))
            try:
                found[case] = (fallback.step_back(mine, RunFolder(root / case), 4, groups), "", 0)
            except CheckpointError as error:
                found[case] = (False, error.cause, error.exit_code)
    return found


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, tuple[bool, str, int]]]]:
    root = tmp_path_factory.mktemp("runs")
    write_checkpoint(root / "made", dealt(state(), 2))
    for case, (_, is_so, _, _) in CASES.items():
        for step in (2, 4):
            shutil.copytree(root / "made", root / case / "checkpoints" / f"step-{step:08d}")
        if is_so:
            flip_bit(root / case / "checkpoints" / "step-00000004" / FILE, -1)
    return root, run_ranks(2, decide, root)


@pytest.mark.parametrize("case", CASES)
def test_what_one_node_alone_finds_ends_the_launch_and_renames_nothing(
    case: str, decided: tuple[Path, list[dict[str, tuple[bool, str, int]]]]
) -> None:
    root, of_ranks = decided
    first, second = (of_rank[case] for of_rank in of_ranks)
    assert first == second, "every rank has the same"
    number, _, _, told = CASES[case]
    steps_back, cause, status = first
    assert steps_back == (not told) and told in cause
    aside = {path.name for path in (root / case / "checkpoints").iterdir()}
    assert aside == {"step-00000002", "step-00000004" if told else "damaged-step-00000004"}
    if told:
        assert str(root / case) in cause and status == (2 if number == errno.EACCES else 86)


def finding(folder: Path, file: str, block: int, number: int = 0) -> fallback._Finding:
    if number:
        return fallback._Finding.of(UnreadableCheckpoint(folder / file, file, OSError(number, "A disk."), block))
    return fallback._Finding.of(DamagedCheckpoint(folder, "Damaged.", (file, block)))


@pytest.mark.parametrize(
    ("harm", "found", "elsewhere"),
    [
        ("none", (FILE, 0), "reads it well"),
        ("flip", (FILE, 0), ""),
        ("flip", (FILE, HEADER), "reads it well"),
        ("cut", (FILE, SIZE), ""),
        ("cut", (FILE, 0), "cannot tell: .* bytes, its manifest says"),
        ("gone", (FILE, MISSING), ""),
        ("gone", (FILE, HEADER), f"cannot tell: .*{FILE} is missing"),
        ("gone", (FILE, SIZE), f"cannot tell: .*{FILE} is missing"),
        ("unmounted", (FILE, 0), "cannot tell: .* is no checkpoint"),
        ("loop", (FILE, 0, errno.EIO), "cannot tell: .*Too many levels of symbolic links"),
        ("loop", (FILE, HEADER, errno.ELOOP), ""),
        ("loop", (FILE, HEADER), "cannot tell: .*Too many levels of symbolic links"),
    ],
)
def test_only_damage_in_the_same_place_is_confirmed(
    harm: str, found: tuple[str, int, int], elsewhere: str, tmp_path: Path
) -> None:
    write_checkpoint(folder := tmp_path / "step-00000004", dealt(state(), 2))
    path = folder / FILE
    if harm == "flip":
        flip_bit(path, -1)
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "unmounted":
        shutil.rmtree(folder)
    elif harm != "none":
        path.unlink()
    if harm == "loop":
        path.symlink_to(path)
    verdict = fallback._look_again(folder, finding(folder, *found), 0)
    assert re.search(elsewhere, verdict) and bool(verdict) == bool(elsewhere)


def test_machines_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machines = []
    for boot in ("a", "b"):
        (tmp_path / boot).write_text(f"{boot}\n")
        monkeypatch.setattr(fallback, "_BOOT_ID", tmp_path / boot)
        machines.append(fallback._machine())
    monkeypatch.setattr(fallback, "_BOOT_ID", tmp_path / "none")
    assert machines == [f"{os.uname().nodename} a", f"{os.uname().nodename} b"]
    assert fallback._machine() == os.uname().nodename


def test_the_manifest_is_looked_at_again_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step-00000004", dealt(state(), 1))
    told = finding(tmp_path, NAME, HEADER)
    assert "reads it well" in fallback._look_again(tmp_path / "step-00000004", told, 0)
    flip_bit(tmp_path / "step-00000004" / NAME, -5)
    assert fallback._look_again(tmp_path / "step-00000004", told, 0) == ""
