"""Unusual images load as upright 8-bit RGB; invalid paths and files are rejected."""

from __future__ import annotations

import base64
import hashlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bpo.formats.images import (
    MAX_PIXELS,
    ImageError,
    image_bytes_digest,
    load_image,
    relative_image_path,
    resolve_image_path,
)


def save(root: Path, name: str, image: Image.Image, **options: object) -> str:
    image.save(root / name, **options)
    return name


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


@pytest.mark.parametrize("mode, colour", [("L", 90), ("RGB", (9, 90, 200)), ("1", 1), ("YCbCr", (90, 128, 128))])
def test_common_modes_become_rgb(tmp_path: Path, mode: str, colour: object) -> None:
    image = Image.new(mode, (5, 3), colour)  # type: ignore[arg-type]
    name = save(tmp_path, "a.tif", image)
    loaded = load_image(tmp_path, name)
    assert (loaded.mode, loaded.size) == ("RGB", (5, 3))
    assert pixel(loaded) == pixel(image.convert("RGB"))


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 20, 20))  # left half blue
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    loaded = load_image(tmp_path, save(tmp_path, "a.jpg", image, exif=exif, quality=95, subsampling=0))
    assert loaded.size == (20, 40)
    assert pixel(loaded, 10, 5)[2] > 200 and pixel(loaded, 10, 35)[0] > 200  # blue is at the top


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_agrees_with_pillow(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    name = save(tmp_path, "a.png", Image.fromarray(noise), exif=exif)
    with Image.open(tmp_path / name) as image:
        expected = ImageOps.exif_transpose(image)
    assert np.array_equal(np.asarray(load_image(tmp_path, name)), np.asarray(expected))


def test_damaged_exif_does_not_lose_the_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = save(tmp_path, "a.jpg", Image.new("RGB", (4, 4)), exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff")
    assert load_image(tmp_path, name).size == (4, 4)


def test_transparency_is_composited_over_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    rgba.putpixel((1, 0), (200, 0, 0, 255))
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.putpixel((1, 0), 1)
    grey_alpha = Image.new("LA", (2, 1), (0, 0))
    names = [
        save(tmp_path, "rgba.png", rgba),
        save(tmp_path, "palette.png", palette, transparency=0),
        save(tmp_path, "la.png", grey_alpha),
        save(tmp_path, "key.png", Image.new("RGB", (2, 1), (1, 2, 3)), transparency=(1, 2, 3)),
    ]
    for name in names:
        assert pixel(load_image(tmp_path, name)) == (255, 255, 255), name
    assert pixel(load_image(tmp_path, "rgba.png"), 1) == (200, 0, 0)
    assert pixel(load_image(tmp_path, "palette.png"), 1) == (200, 0, 0)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    loaded = load_image(tmp_path, save(tmp_path, "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=95))
    red, green, blue = pixel(loaded)
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    if suffix == "pgm":
        (tmp_path / "a.pgm").write_bytes(b"P5 4 1 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    loaded = load_image(tmp_path, f"a.{suffix}")
    assert [pixel(loaded, x) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]


def test_float_and_32_bit_images_use_their_own_range(tmp_path: Path) -> None:
    save(tmp_path, "f.tif", Image.fromarray(np.array([[-1.0, 1.0]], dtype=np.float32)))
    save(tmp_path, "i.tif", Image.fromarray(np.array([[0, 1_000_000]], dtype=np.int32)))
    save(tmp_path, "flat.tif", Image.fromarray(np.array([[3.0, 3.0]], dtype=np.float32)))
    save(tmp_path, "nan.tif", Image.fromarray(np.array([[np.nan, 3.0]], dtype=np.float32)))
    for name in ("f.tif", "i.tif"):
        loaded = load_image(tmp_path, name)
        assert (pixel(loaded, 0), pixel(loaded, 1)) == ((0, 0, 0), (255, 255, 255))
    assert load_image(tmp_path, "flat.tif").size == (2, 1)
    with pytest.raises(ImageError, match="NaN"):
        load_image(tmp_path, "nan.tif")


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixel(load_image(tmp_path, "a.gif")) == (255, 0, 0)


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (1, 1)])
def test_extreme_shapes_load(tmp_path: Path, size: tuple[int, int]) -> None:
    assert load_image(tmp_path, save(tmp_path, "a.png", Image.new("RGB", size))).size == size


def test_a_path_may_contain_links_and_dots_inside_the_root(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    save(tmp_path, "a.png", Image.new("RGB", (2, 2)))
    (tmp_path / "sub" / "link.png").symlink_to(tmp_path / "a.png")
    assert load_image(tmp_path, "sub/../a.png").size == (2, 2)
    assert load_image(tmp_path, "sub/link.png").size == (2, 2)


@pytest.mark.parametrize(
    "relative, message",
    [
        ("", "empty"),
        ("https://example.com/a.png", "download it with `bpo convert --fetch-urls --images DIR`"),
        ("data:image/png;base64,AAAA", "extract it with `bpo convert --images DIR`"),
        (base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(99)).decode(), "extract it with `bpo convert --images DIR`"),
        ("gs://bucket/a.png", r"gs://\); copy the files below data.image_root with the storage's own tool"),
        ("file://host/a.png", r"file://\); copy"),
        ("file:///etc/passwd", "absolute"),
        ("/etc/passwd", "absolute"),
        ("../outside.png", "leads out"),
        ("link_out.png", "leads out"),
        ("linked_dir/outside.png", "leads out"),
        ("missing.png", "missing"),
        ("folder", "not a regular file"),
        ("pipe", "not a regular file"),
        ("nul\x00.png", "not a usable path"),
        ("n" * 5000, "not a usable path"),
        ("zero.png", "0 bytes"),
        ("truncated.png", "cannot be decoded"),
        ("text.png", "cannot be decoded"),
    ],
)
def test_refusals_name_the_reason(tmp_path: Path, relative: str, message: str) -> None:
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    save(tmp_path, "outside.png", Image.new("RGB", (2, 2)))
    (root / "link_out.png").symlink_to(tmp_path / "outside.png")
    (root / "linked_dir").symlink_to(tmp_path)
    (root / "zero.png").touch()
    (root / "text.png").write_text("not a picture")
    os.mkfifo(root / "pipe")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    save(tmp_path, "whole.png", Image.fromarray(noise))
    (root / "truncated.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with pytest.raises(ImageError, match=message):
        load_image(root, relative)


def test_a_sibling_with_the_roots_name_as_prefix_is_outside(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root_private").mkdir()
    save(tmp_path / "root_private", "a.png", Image.new("RGB", (2, 2)))
    with pytest.raises(ImageError, match="leads out"):
        load_image(tmp_path / "root", "../root_private/a.png")


def test_a_missing_root_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="which is not a directory"):
        load_image(tmp_path / "nowhere", "a.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 60_000])
def test_a_decompression_bomb_is_refused_before_decoding(tmp_path: Path, side: int) -> None:
    assert side * side > MAX_PIXELS

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0"))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))
    with pytest.raises(ImageError, match=r"at most 89,478,485 are decoded.*mogrify -resize 89000000@ FILE"):
        load_image(tmp_path, "bomb.png")


@pytest.mark.parametrize(
    ("file", "written", "hint"),
    [
        ("sub/a.png", "sub\\a.png", "'sub/a.png' is there (with slashes)"),
        ("sub/my pic.png", "sub\\my%20pic.png", "'sub/my pic.png' is there (not percent-encoded)"),
        ("cafe\u0301.png", "caf\u00e9.png", "is there (in the Unicode normal form NFD)"),
        ("caf\u00e9.png", "caf%C3%A9.png", "is there (not percent-encoded)"),
        ("cafe\u0301.png", "caf%C3%A9.png", "is there (not percent-encoded)"),
        ("caf\u00e9.png", "cafe\u0301.png", "is there (in the Unicode normal form NFC)"),
        ("a.png", "a.png ", "'a.png' is there (without spaces around it)"),
        ("a.png", "images/a.png", "'a.png' is there (relative to data.image_root)"),
        ("a.png", "a.PNG", "'a.png' is there (with the suffix in another case)"),
        ("a.png", "a.png, a.png", "write several images as a list, ['a.png', 'a.png']"),
        ("a.png", "b\\%00.png", ""),
        ("a.png", "..%2fa.png", ""),
    ],
)
def test_a_hint_names_another_spelling_only_where_a_file_has_it(
    tmp_path: Path, file: str, written: str, hint: str
) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "a.png").write_bytes(b"outside")
    (root / file).write_bytes(b"x")
    with pytest.raises(ImageError, match="is missing under data.image_root") as refused:
        resolve_image_path(root, written)
    assert hint in str(refused.value) and ("is there" in str(refused.value)) == ("is there" in hint)


def test_a_file_url_below_the_root_is_its_path(tmp_path: Path) -> None:
    save(tmp_path, "my pic.png", Image.new("RGB", (2, 2)))
    assert load_image(tmp_path, f"file://{tmp_path}/my%20pic.png").size == (2, 2)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa", "a Git LFS pointer without the data"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing; convert it to PNG"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "a HEIC picture; convert it"),
    ],
)
def test_a_file_that_is_no_picture_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=f"image 'a.jpg' is {what}"):
        load_image(tmp_path, "a.jpg")


def test_digest_is_of_the_files_bytes(tmp_path: Path) -> None:
    name = save(tmp_path, "a.png", Image.new("RGB", (2, 2)))
    assert image_bytes_digest(tmp_path, name) == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    with pytest.raises(ImageError):
        image_bytes_digest(tmp_path, "../a.png")


def test_an_absolute_path_below_the_root_is_taken(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "link").symlink_to(root)
    save(root, "a.png", Image.new("RGB", (4, 4)))
    save(tmp_path, "b.png", Image.new("RGB", (4, 4)))
    # Both the root and a parent folder of the path may be links.
    for base in (root, tmp_path / "link"):
        for path in (root / "a.png", tmp_path / "link" / "a.png"):
            assert load_image(base, str(path)).size == (4, 4)
            assert image_bytes_digest(base, str(path)) == image_bytes_digest(root, "a.png")
    for outside in (tmp_path / "b.png", root / ".." / "b.png", tmp_path / "missing.png", Path("/etc/passwd")):
        with pytest.raises(ImageError, match="is an absolute path outside") as caught:
            load_image(root, str(outside))
        assert caught.value.code == "image-absolute"


def test_an_absolute_path_becomes_relative_only_where_that_names_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "root" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "root")
    assert relative_image_path(tmp_path / "root", f"{tmp_path}/root/inner/a.png") == "inner/a.png"
    assert relative_image_path(tmp_path / "link", f"{tmp_path}/root/a.png") == "a.png"
    assert relative_image_path(tmp_path / "link", f"{tmp_path}/link/a.png") == "a.png"
    for other in (f"{tmp_path}/a.png", f"{tmp_path}/root/inner/../a.png", "a.png", "../a.png"):
        assert relative_image_path(tmp_path / "root", other) == other


def test_an_inaccessible_folder_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(ImageError, match="check its permissions") as caught:
        load_image(tmp_path, "closed/a.png")
    assert caught.value.code == "image-unreadable"


def test_no_program_is_run_on_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    def run(*args: object, **kwargs: object) -> None:
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    page = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.png").write_text(page)
    with pytest.raises(ImageError, match="cannot be decoded .an unknown format"):
        load_image(tmp_path, "a.png")


def test_the_transparent_grey_of_a_16_bit_picture_is_white(tmp_path: Path) -> None:
    save(tmp_path, "a.png", Image.fromarray(np.array([[777, 778]], dtype=np.uint16)))
    content = (tmp_path / "a.png").read_bytes()
    key = b"tRNS" + struct.pack(">H", 777)
    header = 8 + 25
    chunk = struct.pack(">I", 2) + key + struct.pack(">I", zlib.crc32(key))
    (tmp_path / "a.png").write_bytes(content[:header] + chunk + content[header:])
    loaded = load_image(tmp_path, "a.png")
    assert (pixel(loaded, 0), pixel(loaded, 1)) == ((255, 255, 255), (3, 3, 3))
