"""Read-only HTTP server for a page, on 127.0.0.1 only.

Over ssh: `ssh -L 8765:127.0.0.1:8765 HOST`, then open http://127.0.0.1:8765/ locally.
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
    """GET and HEAD of files, for requests whose Host header is a local name."""

    timeout = 60.0  # closes idle connections

    def send_head(self) -> Any:
        # Against DNS rebinding: another site's name may resolve to this address, and the browser then sends that name.
        names = [host.rsplit(":", 1)[0] for host in self.headers.get_all("Host") or [""]]
        if len(names) > 1 or names[0] not in LOCAL_NAMES:
            self.send_error(HTTPStatus.FORBIDDEN, "use http://127.0.0.1")
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
        """Ignores errors of a connection, such as a browser that disconnects."""


def server_of(folder: Path, port: int) -> ThreadingHTTPServer:
    """Creates a server of `folder` on 127.0.0.1; port 0 selects any free port.

    Raises:
        ValueError: The port is in use or not permitted.
    """
    try:
        return _Server(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
    except (OSError, OverflowError) as error:
        reasons = {errno.EADDRINUSE: "is in use", errno.EACCES: "requires root"}
        reason = reasons.get(getattr(error, "errno", None) or 0, f"cannot be used ({error})")
        raise ValueError(
            f"port {port} of 127.0.0.1 {reason}; give another port with --port, or 0 for any free port"
        ) from error
