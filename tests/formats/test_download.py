"""Downloads: only from public addresses, on every hop, from the address that was checked."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from bpo.formats import download as module
from bpo.formats.download import download, is_public
from bpo.formats.images import ImageError


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::5db8:d822", True),
        *[
            (address, False)
            for address in """127.0.0.1 127.9.9.9 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1
            224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255 192.0.2.1 ::1 :: fe80::1 fe80::1%eth0 fc00::1
            fd00:ec2::254 fec0::1 ff02::1
            ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 2002:7f00:1::1 2002:a00:1::1 64:ff9b::7f00:1
            64:ff9b::a9fe:a9fe 2001:db8::1 2001:0:0:0:0:0:f5ff:fffe""".split()
        ],
    ],
)
def test_public_addresses(address: str, expected: bool) -> None:
    assert is_public(address) is expected


class Site:
    """A server on loopback that answers for any host name, and what it was asked."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.redirects: dict[str, str] = {}
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.requests.append((self.path, dict(self.headers)))
                target = site.redirects.get(self.path)
                self.send_response(302 if target else 200)
                if target:
                    self.send_header("Location", target)
                self.end_headers()
                self.wfile.write(b"" if target else b"picture")

            def log_message(self, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Host names ending in `.example` resolve to a public address, connections to which reach the site."""
    site = Site()
    threading.Thread(target=site.server.serve_forever, daemon=True).start()
    connect, resolve = socket.create_connection, socket.getaddrinfo

    def resolved(host: str, port: int, *args: Any, **options: Any) -> Any:
        address = "93.184.216.34" if host.endswith(".example") else host
        return resolve(address, port, *args, **options)

    def connected(address: tuple[str, int], timeout: float) -> socket.socket:
        assert address == ("93.184.216.34", 80), "the connection must go to the checked address"
        return connect(("127.0.0.1", site.port), timeout)

    monkeypatch.setattr(module.socket, "getaddrinfo", resolved)
    monkeypatch.setattr(module.socket, "create_connection", connected)
    yield site
    site.server.shutdown()
    site.server.server_close()


def test_a_public_url_is_fetched_without_credentials(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    site.redirects["/a b.png?x=1"] = "http://other.example/b.png"
    site.redirects["/a%20b.png?x=1"] = "http://other.example/b.png"
    assert download("http://user:secret@photos.example/a b.png?x=1") == b"picture"
    assert [path for path, _ in site.requests] == ["/a%20b.png?x=1", "/b.png"]
    assert [headers["Host"] for _, headers in site.requests] == ["photos.example", "other.example"]
    assert all("secret" not in str(headers) and "Cookie" not in headers for _, headers in site.requests)


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1/",
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]/",
        "http://[::ffff:10.0.0.1]/",
        "//10.1.1.1/",
    ],
)
def test_addresses_that_are_not_public_are_refused_on_every_hop(site: Site, target: str) -> None:
    site.redirects["/a.png"] = target
    for url in (target if ":" in target[:6] else f"http:{target}", "http://photos.example/a.png"):
        with pytest.raises(ImageError, match="which is not a public address") as refused:
            download(url)
        assert refused.value.code == "image-url"
    assert [path for path, _ in site.requests] == ["/a.png"]


def test_a_host_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *args, **options: found)
    with pytest.raises(ImageError, match="'mixed.example' is 10.0.0.1, which is not a public address"):
        download("http://mixed.example/a.png")


def test_other_schemes_loops_and_sizes_are_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.redirects |= {"/file": "file:///etc/passwd", "/loop": "/loop"}
    with pytest.raises(ImageError, match="redirected to 'file:///etc/passwd', cannot be downloaded .not an http"):
        download("http://photos.example/file")
    with pytest.raises(ImageError, match="redirected more than 5 times"):
        download("http://photos.example/loop")
    monkeypatch.setattr(module, "MAX_DOWNLOAD_BYTES", 3)
    with pytest.raises(ImageError, match="larger than"):
        download("http://photos.example/a.png")
    monkeypatch.setattr(module, "MAX_DOWNLOAD_S", -1.0)
    monkeypatch.setattr(module, "MAX_DOWNLOAD_BYTES", 1 << 20)
    with pytest.raises(ImageError, match="takes more than -1 s"):
        download("http://photos.example/a.png")
