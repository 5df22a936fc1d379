"""A stdout that takes nothing for a while, or no more: nothing is lost that somebody could read, and nothing ends."""

import io
import os

import pytest

from gpt4moe.runlog import command_line


def test_a_full_pipe_that_does_not_block_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    read: list[bytes] = []
    monkeypatch.setattr(command_line.time, "sleep", lambda seconds: read.append(os.read(reader, 2**20)))
    text = os.urandom(200_000)  # a pipe holds 65,536
    with io.BufferedWriter(command_line._Droppable(writer, "stdout", 2)) as stream:
        stream.write(text)
    os.close(writer)
    read.append(os.read(reader, 2**20))
    os.close(reader)
    assert b"".join(read) == text and len(read) > 2
