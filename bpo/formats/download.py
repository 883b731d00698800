"""Downloads images from http(s) URLs at public addresses.

URLs come with the data, so each one, and each redirect, might lead into the user's own network: the host is resolved,
all its addresses must be public, and the connection goes to the checked address. No credentials, cookies or proxies are
used.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
import urllib.parse

from bpo.formats.images import ImageError

MAX_DOWNLOAD_BYTES = 64 << 20
SOCKET_TIMEOUT_S = 30.0
MAX_DOWNLOAD_S = 300.0
MAX_REDIRECTS = 5
_BLOCK_BYTES = 1 << 16
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def download(url: str) -> bytes:
    """Downloads at most `MAX_DOWNLOAD_BYTES`, within `MAX_DOWNLOAD_S`.

    Raises:
        ImageError: The URL or one that it redirects to is not http(s) or leads to an address that is not public, or the
            download fails or exceeds a limit.
    """
    deadline, hop = time.monotonic() + MAX_DOWNLOAD_S, url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            content, location = _get(hop, deadline)
            if location is None:
                return content
            hop = urllib.parse.urljoin(hop, location)
    except (OSError, ValueError, http.client.HTTPException) as error:
        via = "" if hop == url else f", redirected to {hop[:120]!r},"
        raise ImageError(
            f"image {url[:120]!r}{via} cannot be downloaded ({error}); check the URL, or download it yourself",
            "image-url",
        ) from error
    raise ImageError(f"image {url[:120]!r} is redirected more than {MAX_REDIRECTS} times; check the URL", "image-url")


def _get(url: str, deadline: float) -> tuple[bytes, str | None]:
    """Returns (content, None) or (b"", redirect)."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("not an http(s) URL")
    is_tls = parts.scheme == "https"
    port = parts.port or (443 if is_tls else 80)
    address = public_address(parts.hostname, port)
    connection = http.client.HTTPConnection(parts.hostname, port)
    connection.default_port = 443 if is_tls else 80  # not repeated in the Host header
    # Connected here and not by name: a second resolution could give another address.
    connection.sock = socket.create_connection((address, port), SOCKET_TIMEOUT_S)
    try:
        if is_tls:
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=parts.hostname)
        path = urllib.parse.quote(
            urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, "")), "/?&=%:+,;@~!$'()*"
        )
        connection.request("GET", path, headers={"User-Agent": "bpo", "Accept": "image/*", "Connection": "close"})
        answer = connection.getresponse()
        location = answer.getheader("Location")
        if answer.status in (301, 302, 303, 307, 308) and location:
            return b"", location
        if answer.status != 200:
            raise OSError(f"HTTP {answer.status} {answer.reason}")
        content = bytearray()
        while block := answer.read(_BLOCK_BYTES):
            content += block
            if len(content) > MAX_DOWNLOAD_BYTES:
                raise OSError(f"it is larger than {MAX_DOWNLOAD_BYTES >> 20} MiB")
            if time.monotonic() > deadline:
                raise OSError(f"it takes more than {MAX_DOWNLOAD_S:g} s")
        return bytes(content), None
    finally:
        connection.close()


def public_address(host: str, port: int) -> str:
    """Resolves a host; returns its first address.

    Raises:
        OSError: The host cannot be resolved.
        ValueError: One of its addresses is not public.
    """
    addresses = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in addresses:
        if not is_public(address):
            raise ValueError(f"{host!r} is {address}, which is not a public address")
    return addresses[0]


def is_public(address: str) -> bool:
    """Returns whether an IP address, and the IPv4 address that it may embed, is a public unicast address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if embedded is None and ip in _NAT64:
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is not None:
            return is_public(str(embedded))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)
