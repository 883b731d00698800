"""A local server with the part of the Hub's HTTP interface that creates a repository and commits small files."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StandIn(ThreadingHTTPServer):
    """Keeps what was uploaded.

    Attributes:
        repositories: Name -> whether it is private.
        files: (repository, path) -> content.
        tokens: The Authorization headers that were sent.
        refuse: Whether to answer every request with 403.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, bool] = {}
        self.files: dict[tuple[str, str], bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuse = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self._answer(200, {"id": "me/model", "sha": "0" * 40, "siblings": [], "private": True, "name": "me"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        path = self.path.split("?")[0]
        if self.server.refuse:
            self._answer(403, {"error": "no write access to this repository"})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif path.endswith("/commit/main"):
            self._commit("/".join(path.split("/")[3:5]), [json.loads(line) for line in body.splitlines()])
        else:  # such as /api/validate-yaml
            self._answer(200, {"warnings": [], "errors": []})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        if name in self.server.repositories:
            self._answer(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
            return
        self.server.repositories[name] = bool(wanted.get("private", wanted.get("visibility") == "private"))
        self._answer(200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def _commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.files[repository, line["value"]["path"]] = content
        oid = f"{len(self.server.files):040x}"
        self._answer(200, {"commitUrl": f"{self.server.url}/{repository}/commit/{oid}", "commitOid": oid})

    def _answer(self, status: int, tree: dict[str, Any]) -> None:
        content = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
