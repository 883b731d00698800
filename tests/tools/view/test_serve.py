"""The server of a page: local requests only, files of the page only."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bpo.tools.view.run import main
from bpo.tools.view.serve import server_of


@contextmanager
def served(folder: Path) -> Iterator[int]:
    with server_of(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "page" / "data").mkdir(parents=True)
    (tmp_path / "page" / "index.html").write_text("groups.jsonl")
    (tmp_path / "page" / "data" / "index.js").write_text("bpoIndex({})")
    (tmp_path / "groups.jsonl").write_text("secret")
    with served(tmp_path / "page") as port:
        yield port


def ask(port: int, path: str, host: str | None = "127.0.0.1", method: str = "GET") -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def test_files_are_served_with_a_policy_that_blocks_other_scripts(port: int) -> None:
    status, headers, body = ask(port, "/")
    assert status == 200 and body == b"groups.jsonl"
    assert "script-src 'self';" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert ask(port, "/data/index.js")[0] == 200
    status, headers, body = ask(port, "/", method="HEAD")
    assert (status, headers["Content-Length"], body) == (200, "12", b"")


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:80", "[::1]", "0.0.0.0", "127.0.0.2", "", None]
)
def test_other_names_of_this_machine_are_refused(port: int, host: str | None) -> None:
    assert ask(port, "/", host)[0] == 403
    assert ask(port, "/", host, "HEAD")[0] == 403


@pytest.mark.parametrize("head", ["HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example", "HTTP/1.0", ""])
def test_a_request_of_two_names_or_none_is_refused(port: int, head: str) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(f"GET / {head}\r\n\r\n".encode())
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert b"403" in answer and b"groups.jsonl" not in answer


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8765", "localhost", "localhost:1"])
def test_local_names_are_accepted(port: int, host: str) -> None:
    assert ask(port, "/", host)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/../groups.jsonl",
        "/%2e%2e/groups.jsonl",
        "/data/../../groups.jsonl",
        "/..%2fgroups.jsonl",
        "//etc/passwd",
        "/data/",
        "/%00",
        "/index.html%00.js",
        "http://127.0.0.1/../groups.jsonl",
        "/" + "a" * 5000,
    ],
)
def test_nothing_else_is_found(port: int, path: str, capfd: pytest.CaptureFixture[str]) -> None:
    status, _, body = ask(port, path)
    assert status == 404 and b"secret" not in body
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_written(port: int, method: str) -> None:
    assert ask(port, "/", method=method)[0] == 501


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc/net/tcp, which Linux has")
def test_it_listens_on_127_0_0_1_only(port: int) -> None:
    listening = [
        line.split()[1]
        for table in ("tcp", "tcp6")
        if Path("/proc/net", table).exists()
        for line in Path("/proc/net", table).read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
    ]
    assert listening == [f"0100007F:{port:04X}"]


def test_a_port_in_use_is_reported_before_anything_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bpo.tools.view.run.build_page", lambda *_: pytest.fail("built"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main([str(tmp_path / "g.jsonl"), "--serve", "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert f"port {port} of 127.0.0.1 is in use" in error and "--port" in error
    assert main([str(tmp_path / "g.jsonl"), "--serve", "--port", "99999"]) == 1
    assert "port 99999" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_a_signal_and_leaves_no_files(data: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", "import sys; from bpo.tools.view.run import main; sys.exit(main(sys.argv[1:]))"]
    (data.parent / "tmp").mkdir()
    process = subprocess.Popen(
        [*command, str(data), "--no-images", "--serve", "--port", "0", "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(data.parent / "tmp")},
        # A shell starts background commands, such as these tests, with SIGINT ignored; children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:(\d+)/", line)
        assert found, line
        status, _, body = ask(int(found[1]), "/")
        assert status == 200 and b"groups.jsonl" in body
        process.send_signal(number)
        _, error = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in error
    assert list((data.parent / "tmp").iterdir()) == []
