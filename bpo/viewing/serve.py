"""Serves a page to this machine alone: 127.0.0.1, its own files, nothing written.

Over ssh: `ssh -L 8765:127.0.0.1:8765 HOST`, and open http://127.0.0.1:8765/ here.
"""

from __future__ import annotations

from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from bpo.viewing.page import POLICY

LOCAL_NAMES = ("127.0.0.1", "localhost")


class _Handler(SimpleHTTPRequestHandler):
    """GET and HEAD of files, to callers that asked for this machine by its own name."""

    def send_head(self) -> Any:
        # A web page of another site may make its name point here; the browser then sends that name.
        if (self.headers.get("Host") or "").rsplit(":", 1)[0] not in LOCAL_NAMES:
            self.send_error(HTTPStatus.FORBIDDEN, "ask for 127.0.0.1")
            return None
        return super().send_head()

    def list_directory(self, path: Any) -> Any:
        self.send_error(HTTPStatus.NOT_FOUND, "no listing")
        return None

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", POLICY.replace(" file:", ""))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def server_of(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of `folder` on 127.0.0.1; port 0 takes any free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
