"""The routes without a model: other hosts' names, bodies that stop, idle connections, a long prompt beside others."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gpt4moe.errors import LaunchError
from gpt4moe.inference.sampling import Sampling
from gpt4moe.serving import http
from gpt4moe.serving.bad_request import BadRequest
from gpt4moe.serving.command import parser
from gpt4moe.serving.desk import Desk, Wanted
from tests.serving.test_fields import SIGHT

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    listener = http.bound_socket("127.0.0.1", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http, "HEAD_SECONDS", 1.0)
        patch.setattr(http, "BODY_SECONDS", 1.0)
        patch.setattr(http, "MORE_CONNECTIONS", 4)
        app = http.Routes(Desk(4), SIGHT, "m", lambda wanted: None).app()
        with http.listening(app, listener, max_texts=4):
            yield listener.getsockname()[1]


def post(port: int, body: bytes, host: str) -> httpx.Response:
    url = f"http://127.0.0.1:{port}/v1/completions"
    return httpx.post(url, content=body, headers={**JSON, "Host": host}, timeout=30)


def test_a_name_of_another_host_is_refused_on_a_loopback_address(port: int) -> None:
    for host in ("evil.com", "evil.com:80", "localhost.evil.com", "127.0.0.1.evil.com", f"evil.com:{port}", "[::2]"):
        assert post(port, b"{}", host).status_code == 421, host
    for host in ("localhost", f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "[::1]", "LOCALHOST:1"):
        assert post(port, b"{}", host).status_code == 400, host
    assert http.host_names("0.0.0.0") is None and http.host_names("node7") is None
    assert "127.0.0.2" in (http.host_names("127.0.0.2") or ())


def test_the_default_host_is_this_machine_alone_and_an_empty_one_is_refused() -> None:
    assert parser("").parse_args(["folder"]).host == "127.0.0.1"
    for empty in ("", " "):
        with pytest.raises(LaunchError, match="--host is empty"):
            http.bound_socket(empty, 0)


def test_half_a_surrogate_pair_and_a_number_beyond_every_float_are_refused(port: int) -> None:
    for body in (
        rb'{"model": "m", "prompt": "\ud800"}', rb'{"model": "m", "\ud800": 1}',
        b'{"model": "m", "prompt": "a", "temperature": 1' + b"0" * 400 + b"}",
    ):  # fmt: skip
        answer = post(port, body, "localhost")
        assert answer.status_code == 400 and answer.json()["error"]["message"]


def _sent(port: int, data: bytes) -> socket.socket:
    out = socket.create_connection(("127.0.0.1", port), timeout=20)
    out.sendall(data)
    return out


def test_clients_that_stop_sending_are_let_go(port: int, caplog: pytest.LogCaptureFixture) -> None:
    start = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    body = start + b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    with _sent(port, b"") as idle, _sent(port, start) as half, _sent(port, body) as slow:
        assert idle.recv(99) == half.recv(99) == b""
        assert b" 408 " in slow.recv(99)
    with caplog.at_level(logging.ERROR):
        _sent(port, body).close()
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        time.sleep(0.2)
    assert not caplog.records


def test_connections_beyond_the_limit_are_refused(port: int) -> None:
    many = [_sent(port, b"") for _ in range(20)]
    try:
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}/health")
        with many[0] as first:  # among those that may ask, but above the limit
            first.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 503 " in first.recv(99)
    finally:
        for one in many:
            one.close()


def test_others_are_served_while_a_long_prompt_is_read(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def slow(*_: object, **__: object) -> None:
        begun.set()
        assert goes_on.wait(20)
        raise BadRequest("read")

    monkeypatch.setattr(http, "read_body", slow)
    found: list[int] = []
    asking = threading.Thread(target=lambda: found.append(post(port, json.dumps({}).encode(), "localhost").status_code))
    asking.start()
    assert begun.wait(20)
    assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200 and not found
    goes_on.set()
    asking.join(20)
    assert found == [400]


def _asked_for_two(desk: Desk) -> httpx.Response:
    def check(wanted: object) -> None:
        raise AssertionError("checked")

    async def story() -> httpx.Response:
        if desk.max_texts == 3:
            desk.submit([Wanted(prompt=[1], max_tokens=2, sampling=Sampling())] * 3, asyncio.Queue())
        app: Any = http.Routes(desk, SIGHT, "m", check).app()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.post("/v1/completions", json={"model": "m", "prompt": "a", "n": 2})

    return asyncio.run(story())


def test_more_texts_than_the_server_takes_are_refused_before_any_is_checked() -> None:
    answer = _asked_for_two(Desk(1))
    assert answer.status_code == 400 and "2 texts at once" in answer.json()["error"]["message"]


def test_a_full_queue_refuses_before_a_body_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_body(*_: object, **__: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(http, "read_body", read_body)
    answer = _asked_for_two(Desk(3))
    assert answer.status_code == 429 and "queue is full" in answer.json()["error"]["message"]
