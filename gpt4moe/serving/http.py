"""The routes: a body in, checked; its texts asked for at the desk; the answer whole, or as a stream of events.

    GET /v1/models   POST /v1/completions   POST /v1/chat/completions   GET /health

Every refusal is a status of 4xx with OpenAI's error object, so that a client shows the cause. A body must be sent as
application/json: a page of another site cannot do that without asking first, and we answer no such question. A site may
also name this machine as its own; on a loopback address we therefore answer only to that address's names.
"""

import asyncio
import ipaddress
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from gpt4moe.errors import ConfigError, LaunchError
from gpt4moe.inference.sight import Sight
from gpt4moe.serving.answers import Answer
from gpt4moe.serving.bad_request import BadRequest
from gpt4moe.serving.desk import Closed, Desk, Event, Full, Job, Wanted
from gpt4moe.serving.fields import Question, read_body

MOST_BYTES = 8 * 2**20
"""Of a body."""
WATCH_SECONDS = 1.0
"""How often it is looked whether the client is still there."""
HEAD_SECONDS, BODY_SECONDS = 10.0, 60.0
"""That a client has to send a request's headers, and its body."""
MORE_CONNECTIONS = 64
"""Than texts that run or wait."""


class Routes:
    """Args:
    check: raises ConfigError when a text does not fit the cache.
    host: the address that the server listens on.
    """

    def __init__(
        self, desk: Desk, sight: Sight, model: str, check: Callable[[Sequence[Wanted]], None],
        host: str = "127.0.0.1",
    ):  # fmt: skip
        self.desk, self.sight, self.model, self.check = desk, sight, model, check
        self.names = host_names(host)
        self.reading = asyncio.Lock()

    def app(self) -> Starlette:
        routes = [
            Route("/v1/models", self.models), Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]), Route("/health", self.health),
        ]  # fmt: skip
        refused: Any = {BadRequest: self._refused, HTTPException: self._no_route}
        return Starlette(routes=routes, exception_handlers=refused)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self.model:
            raise BadRequest(f"There is only the model {self.model!r} here.", status=404, code="model_not_found")
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ending" if self.desk.is_closing else "ok"})

    async def completions(self, request: Request) -> Response:
        return await self._answered(request, is_chat=False)

    async def chat(self, request: Request) -> Response:
        return await self._answered(request, is_chat=True)

    def _model(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": 0, "owned_by": "gpt4moe"}

    async def _answered(self, request: Request, *, is_chat: bool) -> Response:
        data = await _body_of(request, self.names)
        async with self.reading:  # one at a time; a long prompt takes seconds, in which others are served
            with _refusals():
                self.desk.require_room(1)  # before its images are decoded
            question = await asyncio.to_thread(self._question, data, is_chat)
        if len(question.wanted) > self.desk.max_texts:
            raise BadRequest(
                f"{len(question.wanted)} texts at once are more than this server takes, {self.desk.max_texts}.", "n"
            )
        try:
            self.check(question.wanted)
        except ConfigError as error:
            raise BadRequest(f"{error.cause} {error.cure}", "max_tokens") from error
        events: asyncio.Queue[Event] = asyncio.Queue()
        with _refusals():
            job = self.desk.submit(question.wanted, events)
        answer = Answer(question, self.sight.words, self.model)
        if question.is_streamed:
            return StreamingResponse(self._stream(job, events, answer), media_type="text/event-stream")
        try:
            while not answer.is_done:
                try:
                    event = await asyncio.wait_for(events.get(), WATCH_SECONDS)
                except TimeoutError:
                    if await request.is_disconnected():
                        return Response(status_code=499)
                    continue
                if event.failure is not None:
                    raise BadRequest(event.failure, status=503, code="server_ending")
                answer.add(event)
            return JSONResponse(answer.whole())
        finally:
            self.desk.leave(job)

    def _question(self, data: bytes, is_chat: bool) -> Question:
        return read_body(_json_of(data), self.sight, is_chat=is_chat, model=self.model)

    async def _stream(self, job: Job, events: "asyncio.Queue[Event]", answer: Answer) -> AsyncIterator[str]:
        try:
            for piece in answer.begin():
                yield _event(piece)
            while not answer.is_done:
                event = await events.get()
                if event.failure is not None:
                    yield _event(_error(BadRequest(event.failure, status=503, code="server_ending")))
                    return
                answer.add(event)
                found = answer.piece(event.index)
                if found is not None:
                    yield _event(found)
            for piece in answer.end():
                yield _event(piece)
            yield "data: [DONE]\n\n"
        finally:
            self.desk.leave(job)

    def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, BadRequest)
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(_error(error), status_code=error.status, headers=headers)

    def _no_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}: {request.method} {request.url.path}. This server has GET /v1/models, POST " \
                  "/v1/completions and POST /v1/chat/completions."  # fmt: skip
        return JSONResponse(_error(BadRequest(message, status=error.status_code)), status_code=error.status_code)


@contextmanager
def _refusals() -> Iterator[None]:
    """Those of the desk as BadRequest."""
    try:
        yield
    except Full as error:
        raise BadRequest(f"{error} Try again later.", status=429, code="queue_full") from error
    except Closed as error:
        raise BadRequest("The server is ending.", status=503, code="server_ending") from error


def _error(error: BadRequest) -> dict[str, Any]:
    kinds = {429: "rate_limit_error", 503: "server_error"}
    kind = kinds.get(error.status, "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.field, "code": error.code}}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def host_names(host: str) -> frozenset[str] | None:
    """What a client may call a server on this address; None: anything, where it is not of this machine alone."""
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    return frozenset({"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host}) if is_loopback else None


async def _body_of(request: Request, names: frozenset[str] | None) -> bytes:
    """Raises: BadRequest."""
    called = request.headers.get("host", "").lower()
    name = called if called.endswith("]") or ":" not in called else called.rpartition(":")[0]
    if names is not None and name not in names:
        raise BadRequest(f"This server is not {called[:60]!r}. Call it {' or '.join(sorted(names))}.", status=421)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest("Send the body as Content-Type: application/json.", status=415)
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > MOST_BYTES:
                    raise BadRequest(f"The body is larger than {MOST_BYTES:,} bytes.", status=413)
    except TimeoutError as error:
        raise BadRequest(f"The body did not come within {BODY_SECONDS:.0f} s.", status=408) from error
    except ClientDisconnect as error:
        raise BadRequest("The client has gone.", status=499) from error
    return bytes(data)


def _json_of(data: bytes) -> Any:
    """Raises: BadRequest."""
    try:
        found = json.loads(data)
        json.dumps(found, ensure_ascii=False).encode()  # refuses half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"The body is no JSON ({error}).") from error
    return found


def bound_socket(host: str, port: int) -> socket.socket:
    """Raises: LaunchError when the address is taken, empty or not of this machine."""
    if not host.strip():
        raise LaunchError("--host is empty, which would be every address.", "Say so: --host 0.0.0.0, or leave it out.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)  # now, so that a second server is refused
    except (OSError, OverflowError) as error:
        listener.close()
        raise LaunchError(
            f"The server cannot listen on {host} port {port}: {error}.",
            "Choose a free port (--port, 0 for any) and an address of this machine (--host).",
        ) from error
    return listener


class Connection(H11Protocol):
    """Ends when a request's headers do not come in time, which uvicorn has no option for."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.late: asyncio.TimerHandle | None = None
        if self.limit_concurrency is not None and len(self.connections) > 2 * self.limit_concurrency:
            transport.close()  # uvicorn answers those above its limit with 503, when they ask
        self._wait()

    def data_received(self, data: bytes) -> None:
        if self.late is None:
            self._wait()
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.late is not None:
            self.late.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self.late = self.loop.call_later(HEAD_SECONDS, self._end_if_idle)

    def _end_if_idle(self) -> None:
        self.late = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


@contextmanager
def listening(app: Starlette, listener: socket.socket, *, max_texts: int) -> Iterator[None]:
    """Serves in a thread of its own while the work inside goes on; open answers then get two seconds to end.

    Args:
        max_texts: that run or wait; a client of each has a connection.
    """
    config = uvicorn.Config(
        app, http=Connection, lifespan="off", ws="none", log_config=None, access_log=False,
        timeout_graceful_shutdown=2, limit_concurrency=max_texts + MORE_CONNECTIONS,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(5)
        listener.close()
