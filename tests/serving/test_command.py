"""tools/serve.py on two ranks, driven by the official client: texts of tools/generate.py, streams, refusals, ends."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from safetensors.torch import load_file, save_file

from gpt4moe.convert.huggingface import to_huggingface
from gpt4moe.errors import Gpt4MoeError, LaunchError
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.local_ranks import free_port
from gpt4moe.serving import command
from gpt4moe.serving.command import _show
from tests.inference.tool import generate
from tests.numbered_lines import numbered_lines
from tests.spawn import run_ranks
from tests.training.command import outside, train

TOOL = Path(__file__).resolve().parents[2] / "tools" / "serve.py"
PROMPTS = ["word 17 and", "other", "and 100 other things"]
DRAWN: Any = {"temperature": 1.0, "top_p": 0.9, "seed": 4, "max_tokens": 9}


@dataclass
class Server:
    process: "subprocess.Popen[str]"
    url: str
    errors: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)

    def ended(self) -> tuple[int, str]:
        return self.process.wait(60), self.errors.read_text()


@contextlib.contextmanager
def serving(folder: Path, errors: Path, *arguments: object, ranks: int = 2) -> Iterator[Server]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(TOOL), str(folder), "--port", "0", *map(str, arguments)]
    with errors.open("w") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, env=outside())
    try:
        assert process.stdout is not None
        found = re.search(r"at (http://\S+/v1)", process.stdout.readline())
        assert found, errors.read_text()
        yield Server(process, found[1], errors)
    finally:
        for child in [*psutil.Process(process.pid).children(), process] if process.poll() is None else []:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                child.kill()
        process.wait()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = numbered_lines(tmp_path_factory.mktemp("corpus"))
    folder = tmp_path_factory.mktemp("runs") / "run"
    model = ("model.num_attention_heads=4", "model.num_query_groups=2", "model.init_std=0.3", "model.seq_length=128")
    text = ("data.kind=indexed", f"data.path={data}", "model.vocab_size=300", "training.steps=1")
    (ended,) = train(folder, *model, *text)
    assert ended.status == 0, ended.err
    to_huggingface(folder, folder / "hf", dtype="fp32")
    (folder / "hf" / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
    )
    return folder / "hf"


@pytest.fixture(scope="module")
def server(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = ("--max-rows", 4, "--max-queue", 4)
    with serving(exported, tmp_path_factory.mktemp("server") / "err", "--tp", 2, "--name", "tiny", *limits) as found:
        yield found


@pytest.fixture(scope="module")
def wanted(exported: Path) -> list[dict[str, Any]]:
    """What tools/generate.py says, in one process."""
    options = ("--temperature", 1.0, "--top-p", 0.9, "--seed", 4, "--tokens", 9, "--json")
    (ended,) = generate(exported, "--prompt", *PROMPTS, *options)
    assert ended.status == 0, ended.err
    found: list[dict[str, Any]] = json.loads(ended.out)
    return found


def test_the_texts_are_those_of_generate_in_one_process(server: Server, wanted: list[dict[str, Any]]) -> None:
    answer = server.client.completions.create(model="tiny", prompt=PROMPTS, logprobs=0, **DRAWN)
    assert [one.text for one in answer.choices] == [one["text"] for one in wanted]
    assert [one.finish_reason for one in answer.choices] == [one["finish_reason"] for one in wanted]
    assert answer.usage is not None and answer.usage.completion_tokens == sum(len(one["tokens"]) for one in wanted)
    for one, same in zip(answer.choices, wanted, strict=True):
        assert one.logprobs is not None
        assert one.logprobs.token_logprobs == pytest.approx(same["logprobs"], abs=1e-4)
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").id == "tiny"


def test_a_stream_in_pieces_is_the_whole_text(server: Server, wanted: list[dict[str, Any]]) -> None:
    asked: Any = {
        "model": "tiny",
        "prompt": PROMPTS,
        "stream": True,
        "stream_options": {"include_usage": True},
        **DRAWN,
    }
    texts, reasons, usage = ["", "", ""], [None] * 3, None
    for piece in server.client.completions.create(**asked):
        usage = piece.usage
        for one in piece.choices:
            texts[one.index] += one.text
            reasons[one.index] = one.finish_reason or reasons[one.index]
    assert texts == [one["text"] for one in wanted] and reasons == [one["finish_reason"] for one in wanted]
    assert usage.completion_tokens == sum(len(one["tokens"]) for one in wanted)


def test_a_chat_is_its_rendered_template_and_ends_before_a_stop(server: Server) -> None:
    asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "word 17"}], **DRAWN}
    whole = server.client.chat.completions.create(**asked, logprobs=True).choices[0]
    plain = server.client.completions.create(model="tiny", prompt="user: word 17\nassistant:", **DRAWN).choices[0]
    text = whole.message.content
    assert text == plain.text and whole.message.role == "assistant"
    assert whole.logprobs is not None and whole.logprobs.content and len(whole.logprobs.content) <= 9
    stop = text[2:4]
    pieces = list(server.client.chat.completions.create(**asked, stop=stop, stream=True))
    assert "".join(one.choices[0].delta.content or "" for one in pieces) == text[: text.index(stop)]
    assert pieces[-1].choices[0].finish_reason == "stop" and pieces[0].choices[0].delta.role == "assistant"


def test_a_request_joins_the_batch_and_a_full_queue_refuses(server: Server, wanted: list[dict[str, Any]]) -> None:
    long: Any = {"model": "tiny", "prompt": "word", "max_tokens": 110, "n": 8, "seed": 1, "stream": True}
    with server.client.completions.create(**long) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="queue is full"):
            server.client.completions.create(model="tiny", prompt="word", n=8)  # one long text still runs
    # The stream's client has gone: its texts make room.
    for _ in range(200):
        with contextlib.suppress(openai.RateLimitError):
            again = server.client.completions.create(model="tiny", prompt=[PROMPTS[0]] * 8, **DRAWN)
            break
        time.sleep(0.05)  # a step takes long where others work beside
    assert {one.text for one in again.choices} == {wanted[0]["text"]}
    with server.client.completions.create(**{**long, "n": 1}) as stream:
        rest = iter(stream)
        next(rest)
        short = server.client.completions.create(model="tiny", prompt=PROMPTS[1], **DRAWN)
        assert short.choices[0].text == wanted[1]["text"]
        assert sum(1 for _ in rest) > 1


def test_bad_requests_are_refused_with_a_cause(server: Server) -> None:
    good: Any = {"model": "tiny", "prompt": "word"}
    for fields, words, kind in [
        ({"model": "x"}, "no model 'x'", openai.NotFoundError), ({"echo": True}, "'echo'", openai.BadRequestError),
        ({"max_tokens": 999}, "the context is 128", openai.BadRequestError),
        ({"extra_body": {"beam_width": 2}}, "'beam_width'", openai.BadRequestError),
        ({"n": 9}, "9 texts at once", openai.BadRequestError),
    ]:  # fmt: skip
        with pytest.raises(kind, match=words):
            server.client.completions.create(**{**good, **fields})
    json_head = {"Content-Type": "application/json"}
    cases: list[tuple[str, str, bytes, dict[str, str], int]] = [
        ("POST", "/completions", b"{", json_head, 400), ("POST", "/completions", b"\xff", json_head, 400),
        ("POST", "/completions", b"[" * 100_000, json_head, 400), ("POST", "/completions", b"{}", {}, 415),
        ("POST", "/completions", b" " * (2**23 + 1), json_head, 413), ("GET", "/completions", b"", {}, 405),
        ("POST", "/embeddings", b"{}", json_head, 404), ("GET", "/models/other", b"", {}, 404),
    ]  # fmt: skip
    for method, path, body, headers, status in cases:
        answer = httpx.request(method, server.url + path, content=body, headers=headers, timeout=60)
        assert answer.status_code == status and answer.json()["error"]["message"], (method, path, answer.text)
    assert httpx.get(server.url.replace("/v1", "/health"), timeout=60).json() == {"status": "ok"}


def test_a_port_that_is_taken_and_idle_copies_are_refused_on_every_rank(server: Server, exported: Path) -> None:
    port = server.url.split(":")[2].split("/")[0]
    for ranks, options, words in [(1, ("--port", port), "cannot listen"), (2, ("--tp", 1), "2 copies of the model")]:
        ended = generate(exported, *options, ranks=ranks, tool=TOOL)
        assert [rank.status for rank in ended] == [2] * ranks and words in ended[0].err, ended[0].err
        assert "Traceback" not in ended[0].err


def test_a_stdout_that_nobody_reads_ends_the_server_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(LaunchError, match="stdout was closed before the server's address"),
        monkeypatch.context() as with_,
    ):
        with_.setattr(sys, "stdout", None)
        _show("Serving")


def test_term_ends_all_ranks(server: Server) -> None:
    ranks = psutil.Process(server.process.pid).children()
    long: Any = {"model": "tiny", "prompt": "word", "max_tokens": 110, "stream": True}
    os.kill(server.process.pid, signal.SIGTERM)
    _, gone = psutil.wait_procs(ranks, timeout=30)
    assert gone == []
    with pytest.raises(openai.APIConnectionError):
        server.client.completions.create(**long)
    assert "Traceback" not in server.errors.read_text().split("torch")[0]


def test_experts_over_copies_serve_and_a_dead_rank_ends_the_server(
    exported: Path, wanted: list[dict[str, Any]], tmp_path: Path
) -> None:
    with serving(exported, tmp_path / "err", "--ep", 2, "--name", "tiny") as server:
        answer = server.client.completions.create(model="tiny", prompt=PROMPTS, **DRAWN)
        assert [one.text for one in answer.choices] == [one["text"] for one in wanted]
        ranks = psutil.Process(server.process.pid).children()
        rank = next(one for one in ranks if one.environ().get("RANK") == "1")
        threading.Timer(0.5, rank.kill).start()
        status, errors = server.ended()
    assert status != 0
    assert re.search(r"error: (Another rank|The ranks) of the server (has ended|did not end)", errors), errors


def _ended(environment: Environment, arguments: list[str]) -> tuple[str, str, int]:
    """Cause, cure and exit status with which a rank of the server ends."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            command.run(command.parser("").parse_args(arguments), environment)
    except Gpt4MoeError as error:
        return error.cause, error.cure, error.exit_code
    raise AssertionError("no error")


def _ask(port: int, found: list[openai.APIStatusError]) -> None:
    """What a client is told by the server that begins on this port."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    for _ in range(600):
        with contextlib.suppress(openai.APIConnectionError):
            client.models.list()
            break
        time.sleep(0.1)
    try:
        client.completions.create(model="tiny", prompt="word", max_tokens=100)
    except openai.APIStatusError as error:
        found.append(error)


def test_logits_that_are_no_numbers_end_every_copy_with_that_cause_and_a_client_with_503(
    exported: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    (file,) = broken.glob("*.safetensors")
    tensors = load_file(file)
    tensors["lm_head.weight"] *= 1e38  # finite; a logit is not
    save_file(tensors, file, {"format": "pt"})
    port, told = free_port(), list[openai.APIStatusError]()
    client = threading.Thread(target=_ask, args=(port, told))
    client.start()
    arguments = [str(broken), "--port", str(port), "--name", "tiny", "--ep", "2"]
    first, second = run_ranks(2, _ended, arguments, timeout_seconds=90)
    client.join()
    assert "logits are NaN" in first[0] and "earlier" in first[1] and first[2] == 2
    assert second == first
    assert [error.status_code for error in told] == [503] and "The server has ended." in told[0].message
