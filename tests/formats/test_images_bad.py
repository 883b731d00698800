"""Every kind of bad image is reported by its code; unusual ones load."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from bpo.formats.check import check_data
from bpo.formats.images import load_image


def write_groups(root: Path, *images: str) -> Path:
    """Writes groups with one image each."""
    completions = [{"response": "A bus.", "score": 1, "type": "gt"}, {"response": "A tram.", "score": 0, "type": "hal"}]
    lines = [
        json.dumps({"id": str(n), "images": [image], "prompt": "What?", "completions": completions})
        for n, image in enumerate(images)
    ]
    (root / "g.jsonl").write_text("\n".join(lines) + "\n")
    return root / "g.jsonl"


def check(path: Path, opens_images: bool = True) -> dict[str, int]:
    return dict(check_data(path, image_root=path.parent, opens_images=opens_images).counts)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    return tmp_path


def bomb(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def encoded(size: tuple[int, int], form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def put(name: str, content: bytes) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        (root / name).write_bytes(content)
        return name

    return make


def make_folder(root: Path) -> str:
    (root / "folder.png").mkdir()
    return "folder.png"


def make_pipe(root: Path) -> str:
    os.mkfifo(root / "pipe.png")
    return "pipe.png"


def make_link_out(root: Path) -> str:
    (root / "link.png").symlink_to("/etc/passwd")
    return "link.png"


def make_loop(root: Path) -> str:
    (root / "loop.png").symlink_to(root / "loop.png")
    return "loop.png"


BAD_IMAGES: list[tuple[str, Callable[[Path], str]]] = [
    ("image-url", lambda root: "https://example.com/a.png"),
    ("image-scheme", lambda root: "s3://bucket/a.png"),
    ("image-absolute", lambda root: "file:///etc/passwd"),
    ("image-absolute", lambda root: "/etc/passwd"),
    ("image-outside", lambda root: "../../etc/passwd"),
    ("image-outside", make_link_out),
    ("image-bad-path", lambda root: "nul\x00.png"),
    ("image-bad-path", lambda root: "n" * 5000),
    ("image-bad-path", make_loop),
    ("image-missing", lambda root: "missing.png"),
    ("image-no-file", make_folder),
    ("image-no-file", make_pipe),
    ("image-empty", put("zero.png", b"")),
    ("image-too-large", put("bomb.png", bomb(30_000))),
    ("image-undecodable", put("truncated.png", encoded((64, 64))[:3000])),
    ("image-undecodable", put("truncated.jpg", encoded((64, 64), "JPEG")[:1000])),
    ("image-undecodable", put("text.png", b"not a picture")),
    ("image-undecodable", put("page.jpg", b"<html>404 Not Found</html>")),
    ("image-extension", put("really_png.jpg", encoded((8, 8)))),
    ("image-shape", put("needle.png", encoded((1, 1000)))),
]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("code", "make"), BAD_IMAGES)
def test_a_bad_image_is_named_by_its_code(root: Path, code: str, make: Callable[[Path], str]) -> None:
    path = write_groups(root, "good.png", make(root), "good.png")
    assert check(path) == {code: 1}
    assert check(path, opens_images=False) == {}


@pytest.mark.parametrize("form", ["webp", "avif"])
def test_webp_and_avif_are_read_if_pillow_supports_them(root: Path, form: str) -> None:
    if not features.check(form):
        pytest.skip(f"this Pillow has no {form}")
    (root / f"a.{form}").write_bytes(encoded((16, 16), form.upper()))
    assert check(write_groups(root, f"a.{form}")) == {}


def test_the_first_page_of_several_is_used(root: Path) -> None:
    pages = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    pages[0].save(root / "pages.tif", save_all=True, append_images=pages[1:])
    assert load_image(root, "pages.tif").getpixel((0, 0)) == (255, 0, 0)
