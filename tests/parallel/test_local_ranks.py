"""The fork server imports what it should preload and leaves this process's variables alone; how a port is chosen."""

import os
import random
import socket
from pathlib import Path

import pytest

from gpt4moe.parallel import local_ranks
from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks


def _preloaded(environment: Environment) -> bool:
    import sys

    return "gpt4moe.train" in sys.modules


def test_ranks_start_with_what_was_preloaded_and_other_children_see_nothing_of_it() -> None:
    before = os.environ.get("PYTHONPATH")
    assert run_ranks(1, _preloaded)[0]
    assert os.environ.get("PYTHONPATH") == before


def _visible_gpus(environment: Environment) -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def test_ranks_and_commands_of_tests_see_no_gpu() -> None:
    """Also on a machine that has some: a GPU takes one rank, and results are equal to the last bit on CPUs alone."""
    assert run_ranks(1, _visible_gpus) == [""]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_no_outgoing_connection_can_take_a_chosen_port() -> None:
    setting = Path("/proc/sys/net/ipv4/ip_local_port_range")
    lowest = int(setting.read_text().split()[0]) if setting.exists() else 32768
    assert all(1024 <= local_ranks.free_port() < lowest for _ in range(20))


def test_a_port_in_use_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    free = local_ranks.free_port()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        used = listener.getsockname()[1]
        monkeypatch.setattr(random.SystemRandom, "sample", lambda self, ports, number: [used, free])
        assert local_ranks.free_port() == free


def test_a_seed_of_the_process_does_not_choose_the_port() -> None:
    random.seed(5)
    first = local_ranks.free_port()
    random.seed(5)
    others = [local_ranks.free_port() for _ in range(3)]
    assert others != [first] * 3
