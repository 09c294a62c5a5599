"""What `wandb sweep`, `wandb agent` and a run that is online ask of W&B's server, answered on this machine."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import yaml

ENTITY, PROJECT, SWEEP = "someone", "a-project", "abc12345"


class WandbServer:
    """A server for one sweep; a context in which it answers at `url`.

    Attributes:
        sweep: the sweep as it arrived.
        configs: by run, its configuration as it arrived.
        history: by run, all that it logged, line by line.
        ended: by run, its exit code.
        unknown: questions without an answer.
    """

    def __init__(self) -> None:
        self.sweep: dict[str, Any] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.ended: dict[str, int] = {}
        self.unknown: list[str] = []
        self._waiting: Iterator[dict[str, Any]] = iter(())
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Answer a GraphQL question."""
        found = re.match(r"\s*(?:query|mutation)\s+(\w+)", question["query"])
        assert found
        known: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "Viewer": self._viewer,
            "UpsertSweep": self._upsert_sweep,
            "SweepWithRuns": self._sweep_with_runs,
            "CreateAgent": lambda _: {"createAgent": {"agent": {"id": "agent"}}},
            "Heartbeat": self._heartbeat,
            "UpsertBucket": self._upsert_bucket,
            "CreateRunFiles": self._create_run_files,
            "OrganizationCoreWeaveOrganizationID": lambda _: {"entity": {"organization": None}},
            "ArtifactType": lambda _: {},  # it keeps no tables
        }
        if (name := found[1]) not in known:
            self.unknown.append(name)
            return {}
        with self._lock:
            return known[name](question.get("variables") or {})

    def stream(self, run: str, sent: dict[str, Any]) -> None:
        """Take what a run logs."""
        with self._lock:
            lines = sent.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.history.setdefault(run, []).extend(map(json.loads, lines))
            if sent.get("complete"):
                self.ended[run] = sent["exitcode"]

    def _viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "1", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}}

    def _upsert_sweep(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.sweep = yaml.safe_load(asked["config"])
        parameters = self.sweep["parameters"]
        points = itertools.product(*(entry.get("values", [entry.get("value")]) for entry in parameters.values()))
        self._waiting = (dict(zip(parameters, point, strict=True)) for point in points)
        return {"upsertSweep": {"sweep": {"name": SWEEP, "project": self._project()}, "configValidationWarnings": []}}

    def _sweep_with_runs(self, _: dict[str, Any]) -> dict[str, Any]:
        sweep = {
            "id": "1",
            "name": SWEEP,
            "state": "RUNNING",
            "config": yaml.safe_dump(self.sweep),
            "runs": {"edges": []},
        }
        return {"project": {"sweep": sweep}}

    def _heartbeat(self, asked: dict[str, Any]) -> dict[str, Any]:
        commands: list[dict[str, Any]] = []
        if not any(json.loads(asked["runState"]).values()):
            point = next(self._waiting, None)
            commands = [{"type": "exit"}]
            if point is not None:
                args = {name: {"value": value} for name, value in point.items()}
                run = f"run{len(self.configs)}"
                commands = [{"type": "run", "run_id": run, "program": self.sweep["program"], "args": args}]
        return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}

    def _upsert_bucket(self, asked: dict[str, Any]) -> dict[str, Any]:
        config = json.loads(asked["config"])
        self.configs[asked["name"]] = {name: entry["value"] for name, entry in config.items()}
        bucket = {"id": asked["name"], "name": asked["name"], "sweepName": SWEEP, "project": self._project()}
        return {
            "upsertBucket": {"bucket": {**bucket, "config": asked["config"], "historyLineCount": 0}, "inserted": True}
        }

    def _create_run_files(self, asked: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in asked["files"]]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}

    @staticmethod
    def _project() -> dict[str, Any]:
        return {"id": "1", "name": PROJECT, "entity": {"id": "1", "name": ENTITY}}

    def _handler(outer) -> type[BaseHTTPRequestHandler]:  # the handler has a self of its own
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self._body()
                answer: dict[str, Any] = {}
                if self.path == "/graphql":
                    answer = {"data": outer.answer(json.loads(body))}
                elif self.path.endswith("/file_stream"):
                    outer.stream(self.path.split("/")[-2], json.loads(body))
                self._send(answer)

            def do_PUT(self) -> None:
                self._body()
                self._send({})

            def _body(self) -> bytes:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

            def _send(self, answer: dict[str, Any]) -> None:
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
