"""A stand-in for W&B's server on 127.0.0.1: one grid sweep, and what its runs send.

It answers what the client of the pinned version asks (GraphQL, the file stream, uploads, artifacts), as far as
`wandb sweep`, `wandb agent` and online runs, resumed ones too, need it. So it shows that rlkit and the client speak
together; what the real server does with a sweep, it does not show.
"""

import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import yaml

PROJECT = {"id": "UHJvamVjdA==", "name": "rlkit", "entity": {"id": "RW50aXR5", "name": "somebody"}}
KEY = "0123456789abcdef" * 2 + "01234567"  # 40 signs, as W&B's keys have


class Wandb:
    """What came in: the sweep, the settings that were handed out, by run its config, history, alerts and exit code; the
    uploaded files by name, and the artifacts by name with a version, name -> content of its files, for each."""

    def __init__(self) -> None:
        self.sweep: dict[str, Any] = {}
        self.coming: list[dict[str, Any]] = []
        self.given: dict[str, dict[str, Any]] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.summary: dict[str, dict[str, Any]] = {}
        self.exits: dict[str, int] = {}
        self.alerts: dict[str, list[str]] = {}
        self.uploads: dict[str, bytes] = {}
        self._artifacts: list[str] = []  # the name of each version; its position is the version's id
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Wandb":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_ENTITY": "somebody", "WANDB_PROJECT": "rlkit"}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        wandb = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *words: object) -> None:
                pass

            def reply(self, answer: Any) -> None:
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def taken(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def do_GET(self) -> None:
                self.reply({})

            def do_PUT(self) -> None:
                body = self.taken()
                with wandb.lock:
                    wandb.uploads[unquote(self.path).removeprefix("/upload/")] = body
                self.reply({})

            def do_POST(self) -> None:
                body = self.taken()
                with wandb.lock:
                    if "/file_stream" in self.path:
                        self.reply(wandb.streamed(self.path.split("/")[-2], json.loads(body)))
                    elif self.path.startswith("/graphql"):
                        asked = json.loads(body)
                        self.reply({"data": wandb.answer(asked["query"], asked.get("variables") or {})})
                    else:  # the client's own telemetry, in protobuf
                        self.reply({})

        return Handler

    def streamed(self, run: str, body: dict[str, Any]) -> dict[str, Any]:
        files = body.get("files") or {}
        for name, part in files.items():
            lines = [json.loads(line) for line in part.get("content", []) if name.endswith((".jsonl", ".json"))]
            if name == "wandb-history.jsonl":  # what a client writes over is gone
                self.history[run] = [*self.history.get(run, [])[: part["offset"]], *lines]
            elif name == "wandb-summary.json":
                self.summary[run] = lines[-1]
        if body.get("complete"):
            self.exits[run] = body.get("exitcode", -1)
        return {"limits": {}, "stopped": False}

    def answer(self, query: str, told: dict[str, Any]) -> dict[str, Any]:
        asked = set(re.findall(r"\b(\w+)\s*[({]", query))
        if "upsertSweep" in asked:
            self._begin(yaml.safe_load(told["config"]))
            return {"upsertSweep": {"sweep": {"id": "U3dlZXA=", "name": "sw1", "project": PROJECT}, **NO_WARNINGS}}
        if "createAgent" in asked:
            return {"createAgent": {"agent": {"id": "QWdlbnQ="}}}
        if "agentHeartbeat" in asked:
            return {"agentHeartbeat": {"agent": {"id": "QWdlbnQ="}, "commands": json.dumps(self._commands(told))}}
        if "upsertBucket" in asked:
            return {"upsertBucket": {"bucket": self._bucket(told), "inserted": True}}
        if "notifyScriptableRunAlert" in asked:
            self.alerts.setdefault(told["runName"], []).append(told["title"])
            return {"notifyScriptableRunAlert": {"success": True}}
        if "model" in asked:
            return {"model": {**PROJECT, "bucket": self._resumed(told["name"])}}
        if any("Artifact" in word for word in asked):
            return self._artifact(asked, told)
        if "createRunFiles" in asked:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in told.get("files", [])]
            return {"createRunFiles": {"runID": "UnVu", "uploadHeaders": [], "files": files}}
        if "viewer" in asked:
            viewer = {"id": "VmlldzM=", "entity": "somebody", "username": "somebody", "email": "a@b", "flags": "{}"}
            return {"viewer": {**viewer, "teams": {"edges": []}, "admin": False}, "serverInfo": SERVER}
        if "sweep" in asked:
            return {"project": {**PROJECT, "sweep": self._sweep()}}
        return {"serverInfo": SERVER}

    def artifacts(self) -> dict[str, list[dict[str, bytes]]]:
        """name -> its versions, each as name of a file -> its bytes."""
        found: dict[str, list[dict[str, bytes]]] = {}
        for number, name in enumerate(self._artifacts):
            place = f"artifact/{number}/"
            files = {key.removeprefix(place): body for key, body in self.uploads.items() if key.startswith(place)}
            found.setdefault(name, []).append(files)
        return found

    def _artifact(self, asked: set[str], told: dict[str, Any]) -> dict[str, Any]:
        if "createArtifact" in asked:
            self._artifacts.append(told["input"]["artifactCollectionName"])
            made = {"id": f"{len(self._artifacts) - 1}", "state": "PENDING"}
            return {"createArtifact": {"artifact": {**made, "artifactSequence": {"latestArtifact": None}}}}
        if "createArtifactManifest" in asked or "updateArtifactManifest" in asked:
            which = "createArtifactManifest" if "createArtifactManifest" in asked else "updateArtifactManifest"
            file = {"id": "RmlsZQ==", "name": "m", "displayName": "m", "uploadUrl": f"{self.url}/manifest"}
            return {which: {"artifactManifest": {"id": "TWFuaWZlc3Q=", "file": {**file, "uploadHeaders": []}}}}
        if "createArtifactFiles" in asked:
            edges = [{"node": self._artifact_file(one)} for one in told["input"]["artifactFiles"]]
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if "commitArtifact" in asked:
            return {"commitArtifact": {"artifact": {"id": told["artifactID"], "digest": "d"}}}
        return {"project": {"artifact": None, "artifactType": None}}  # none is there yet

    def _artifact_file(self, one: dict[str, Any]) -> dict[str, Any]:
        number, name = one["artifactID"], one["name"]
        place = {"uploadUrl": f"{self.url}/upload/artifact/{number}/{name}", "uploadHeaders": []}
        more = {"uploadMultipartUrls": None, "storagePath": None, "artifact": {"id": number}}
        return {"id": "RmlsZQ==", "name": name, "displayName": name, **place, **more}

    def _resumed(self, name: str) -> dict[str, Any] | None:
        """What a client that goes on with a run is told of it."""
        if name not in self.configs:
            return None
        lines = self.history.get(name, [])
        tail = json.dumps([json.dumps(line) for line in lines[-1:]])
        counts = {"historyLineCount": len(lines), "logLineCount": 0, "eventsLineCount": 0}
        told = {"config": json.dumps(self.configs[name]), "summaryMetrics": json.dumps(self.summary.get(name, {}))}
        more = {"historyTail": tail, "eventsTail": "[]", "tags": [], "notes": None, "wandbConfig": json.dumps({"t": 1})}
        return {"id": "UnVu", "name": name, "displayName": name, "stopped": False, **counts, **told, **more}

    def _begin(self, sweep: dict[str, Any]) -> None:
        """Every point of the grid, as W&B hands them out: the parameters in the order of their names."""
        self.sweep = sweep
        names = sorted(sweep["parameters"])
        values = [sweep["parameters"][name].get("values", [sweep["parameters"][name].get("value")]) for name in names]
        self.coming = [dict(zip(names, point, strict=True)) for point in itertools.product(*values)]

    def _sweep(self) -> dict[str, Any]:
        empty = ("description", "heartbeatAt", "updatedAt", "controller", "scheduler")
        told = {"id": "U3dlZXA=", "name": "sw1", "method": "grid", "state": "RUNNING", "earlyStopJobRunning": False}
        config = yaml.safe_dump(self.sweep)
        runs = {"edges": []}
        return {**dict.fromkeys(empty), **told, "config": config, "createdAt": "2026-01-01", "runs": runs}

    def _commands(self, told: dict[str, Any]) -> list[dict[str, Any]]:
        if json.loads(told.get("runState") or "{}"):  # one is under way
            return []
        if not self.coming:
            return [{"type": "exit"}]
        name, setting = f"run{len(self.given)}", self.coming.pop(0)
        self.given[name] = setting
        arguments = {key: {"value": value} for key, value in setting.items()}
        return [{"type": "run", "program": self.sweep.get("program"), "run_id": name, "args": arguments}]

    def _bucket(self, told: dict[str, Any]) -> dict[str, Any]:
        name = told.get("name") or "unnamed"
        if told.get("config"):
            self.configs[name] = json.loads(told["config"])
        counts = dict.fromkeys(("historyLineCount", "logLineCount", "eventsLineCount"), 0)
        empty = dict.fromkeys(("description", "config", "historyTail", "eventsTail", "summaryMetrics"))
        more = {"sweepName": told.get("sweep"), "project": PROJECT, "stopped": False, "tags": []}
        return {"id": "UnVu", "name": name, "displayName": name, **counts, **empty, **more}


SERVER = {"cliVersionInfo": {"max_cli_version": "0.99.0"}, "latestLocalVersionInfo": None, "features": []}
NO_WARNINGS = {"configValidationWarnings": []}
