"""Serves a page to this machine alone: 127.0.0.1, its own files, nothing written.

Over ssh: `ssh -L 8765:127.0.0.1:8765 HOST`, and open http://127.0.0.1:8765/ here.
"""

from __future__ import annotations

import errno
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from bpo.tools.view.page import POLICY

LOCAL_NAMES = ("127.0.0.1", "localhost")


class _Handler(SimpleHTTPRequestHandler):
    """GET and HEAD of files, to callers that asked for this machine by its own name."""

    timeout = 60.0  # a connection on which nothing is asked is closed

    def send_head(self) -> Any:
        # A web page of another site may make its name point here; the browser then sends that name.
        names = [host.rsplit(":", 1)[0] for host in self.headers.get_all("Host") or [""]]
        if len(names) > 1 or names[0] not in LOCAL_NAMES:
            self.send_error(HTTPStatus.FORBIDDEN, "ask for 127.0.0.1")
            return None
        if "\0" in self.translate_path(self.path):
            self.send_error(HTTPStatus.NOT_FOUND, "no such file")
            return None
        return super().send_head()

    def list_directory(self, path: Any) -> Any:
        self.send_error(HTTPStatus.NOT_FOUND, "no listing")
        return None

    def end_headers(self) -> None:
        policy = POLICY.replace(" file:", "") + "; frame-ancestors 'none'"
        self.send_header("Content-Security-Policy", policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of a file is no error of ours."""


def server_of(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of `folder` on 127.0.0.1; port 0 takes any free one.

    Raises:
        ValueError: The port is in use, or may not be used.
    """
    try:
        return _Server(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
    except (OSError, OverflowError) as error:
        reasons = {errno.EADDRINUSE: "is in use", errno.EACCES: "is for the administrator alone"}
        reason = reasons.get(getattr(error, "errno", None) or 0, f"cannot be used ({error})")
        raise ValueError(
            f"port {port} of 127.0.0.1 {reason}; give another with --port, or 0 for any free one"
        ) from error
