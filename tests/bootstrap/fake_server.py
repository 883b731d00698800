"""An OpenAI-compatible server on 127.0.0.1 with answers defined by the test, over real HTTP."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any

# A bytes body is sent unchanged. The status CUT announces the whole answer but stops in the middle; DRIP sends ten
# bytes per second.
Answer = tuple[int, "dict[str, Any] | bytes"]
CUT, DRIP = -1, -2


def completion(text: str, finish_reason: str = "stop") -> Answer:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}]}


def _load_adapter(body: dict[str, Any], models: list[str] | None) -> Answer:
    if models is None:
        return 404, {"detail": "Not Found"}
    if body["lora_name"] in models:
        return 400, {"message": f"The lora adapter '{body['lora_name']}' has already been loaded."}
    models.append(body["lora_name"])
    return 200, b"Success"


@contextmanager
def fake_server(
    answer: Callable[[dict[str, Any], int], Answer],
    headers: Mapping[str, str] = MappingProxyType({}),
    models: list[str] | None = None,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serves `answer(body, number of this request)`; yields the base URL and the bodies received so far.

    Args:
        models: Names that GET /models lists, which is not counted as a request. As vLLM, POST /load_lora_adapter adds
            to them and refuses a name that is there.
    """
    received: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                received.append({**body, "path": self.path, "key": self.headers.get("Authorization")})
                number = len(received)
            status, reply = _load_adapter(body, models) if "lora" in self.path else answer(body, number)
            content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(200 if status in (CUT, DRIP) else status)
            self.send_header("Content-Length", str(len(content)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the client timed out, as some tests expect
                if status == DRIP:
                    for byte in content:
                        self.wfile.write(bytes([byte]))
                        time.sleep(0.1)
                    return
                self.wfile.write(content[: len(content) // 2] if status == CUT else content)

        def do_GET(self) -> None:  # also what a client sends that follows a redirect
            listed = models is not None and self.path.endswith("/models")
            content = json.dumps({"data": [{"id": name} for name in models or ()]}).encode() if listed else b""
            with lock:
                received.extend([] if listed else [{"path": self.path, "key": self.headers.get("Authorization")}])
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
