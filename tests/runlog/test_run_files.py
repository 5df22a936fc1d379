"""Files of a run folder appear whole or not at all, and a folder's lock names a process that lives or does not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt4moe.runlog.run_files import SUMS_FILE, add_sums, drop_sum, holder, is_at_work, process_began, replace_file


def locked_by(folder: Path, process: int, node: str) -> Path:
    (folder / ".lock").write_text(f"process {process} on {node}")
    return folder


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "folder" / "file.json"
    replace_file(file, b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        replace_file(file, b"new")
    assert [(path.name, path.read_bytes()) for path in file.parent.iterdir()] == [("file.json", b"old")]


def test_damaged_sums_stay_as_they_are_until_somebody_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    add_sums(tmp_path, "a.json")
    damaged = (tmp_path / SUMS_FILE).read_text()[1:]
    (tmp_path / SUMS_FILE).write_text(damaged)
    add_sums(tmp_path, "a.json")
    drop_sum(tmp_path, "a.json")
    assert (tmp_path / SUMS_FILE).read_text() == damaged


def test_a_folder_is_worked_on_while_the_process_that_locked_it_lives(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        folder = locked_by(tmp_path, process.pid, os.uname().nodename)
        assert holder(folder) == (process.pid, os.uname().nodename)
        assert is_at_work(folder)
        assert not is_at_work(locked_by(tmp_path, process.pid, "another-node"))
    finally:
        process.kill()
        process.wait()
    assert not is_at_work(locked_by(tmp_path, process.pid, os.uname().nodename))


def test_a_lock_that_is_older_than_the_process_of_its_number_is_nobodys(tmp_path: Path) -> None:
    folder = locked_by(tmp_path, os.getpid(), os.uname().nodename)
    before = process_began("self") - 60
    os.utime(folder / ".lock", (before, before))
    assert not is_at_work(folder)
    assert holder(tmp_path / "nothing") is None


def test_a_process_began_before_now_and_not_long_ago() -> None:
    assert 0 <= time.time() - process_began("self") < 24 * 3600
