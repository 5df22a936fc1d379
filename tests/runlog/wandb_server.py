"""A server that answers as much of wandb's API as runs and workspaces ask for, and keeps what it was sent.

GraphQL for runs, alerts and views; file streams, whose lines lie at offsets as on wandb's own; files are taken and
forgotten. What wandb 0.31 sends was read from its requests; a real server may refuse what this one takes.
"""

import gzip
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

HISTORY = "wandb-history.jsonl"


@dataclass
class StoredRun:
    """What the server has of one run."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    """What its starts said: displayName, groupName, tags, config ..."""
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    """File -> offset -> line."""
    overwritten: list[str] = field(default_factory=list)

    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for _, line in sorted(self.lines.get(HISTORY, {}).items())]

    @property
    def steps(self) -> list[int]:
        return [line["_step"] for line in self.history()]

    def write(self, file: str, offset: int, lines: list[str]) -> None:
        kept = self.lines.setdefault(file, {})
        for place, line in enumerate(lines, start=offset):
            if file == HISTORY and place in kept:
                self.overwritten.append(kept[place])
            kept[place] = line

    def resume_status(self) -> dict[str, Any]:
        counts = {name: len(self.lines.get(f"wandb-{name}.jsonl", {})) for name in ("history", "events")}
        config = self.values.get("config") or "{}"
        wandbs_own = json.loads(config).get("_wandb", {}).get("value", {})  # wandb takes a run for begun that has a "t"
        last = [line for _, line in sorted(self.lines.get(HISTORY, {}).items())][-1:]
        return {
            "id": self.name, "name": self.name, "summaryMetrics": self.values.get("summaryMetrics") or "{}",
            "displayName": self.values.get("displayName"), "logLineCount": 0, "historyLineCount": counts["history"],
            "eventsLineCount": counts["events"], "historyTail": json.dumps(last), "eventsTail": "[]",
            "config": config, "tags": self.values.get("tags") or [], "notes": None,
            "wandbConfig": json.dumps({key: wandbs_own[key] for key in ("t",) if key in wandbs_own}),
        }  # fmt: skip


class WandbServer(http.server.ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.runs: dict[str, StoredRun] = {}
        self.asked: list[tuple[str, str]] = []
        """(operation, the run's name) in order."""
        self.alerts: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []

    @property
    def variables(self) -> dict[str, str]:
        """Of a process that shall take this server for wandb's."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": "0" * 40}

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """`data` of a GraphQL answer."""
        self.asked.append((operation, str(given.get("name"))))
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "team"}}
        if operation == "RunResumeStatus":
            run = self.runs.get(given["name"])
            return {"model": {**project, "bucket": run and run.resume_status()}}
        if operation == "UpsertBucket":
            name, is_new = given["name"], given["name"] not in self.runs
            run = self.runs.setdefault(name, StoredRun(name))
            run.values.update({key: value for key, value in given.items() if value is not None})
            bucket = {"id": name, "name": name, "displayName": name, "description": None, "config": "{}",
                      "sweepName": None, "project": project, "historyLineCount": len(run.steps)}  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}
        if operation == "CreateRunFiles":
            place = self.variables["WANDB_BASE_URL"]
            files = [{"name": name, "uploadUrl": f"{place}/storage/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        if operation == "NotifyScriptableRunAlert":
            self.alerts.append(given)
            return {"notifyScriptableRunAlert": {"success": True}}
        if operation == "View":
            node = {"id": "1", "displayName": "gpt4moe", "spec": self.views[-1]["spec"]}
            return {"project": {"allViews": {"edges": [{"node": node}]}}}
        if "spec" in given:
            self.views.append(given)
        user = {"id": "1", "username": "u", "email": "e", "flags": "{}", "entity": "team", "teams": {"edges": []}}
        view = {"view": {"id": "1", "name": "nw-abc-v"}, "inserted": True}
        return {"viewer": user, "serverInfo": {}, "upsertView": view}


class _Answer(http.server.BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self._body()
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            answer = {"data": self.server.answer(operation[1] if operation else "", asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            run = self.server.runs[self.path.split("/")[-2]]
            for file, chunk in (json.loads(body).get("files") or {}).items():
                run.write(file, chunk["offset"], chunk["content"])
        self._send(json.dumps(answer).encode())

    def do_PUT(self) -> None:
        self._body()
        self._send(b"")

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _send(self, answer: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
