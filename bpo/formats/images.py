"""Safe image loading: confines paths to the image root and decodes any photograph to 8-bit RGB.

Image lists are untrusted: a path may point anywhere and a file may contain anything. Every rejection is an
`ImageError` that names the file and the fix.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import logging
import re
import unicodedata
import urllib.parse
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from bpo.formats.foreign import foreign_kind
from bpo.formats.problems import RecordError

logger = logging.getLogger(__name__)

# `_check_size` rejects these images.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

MAX_PIXELS = 89_478_485  # Pillow's default limit: 256 MiB of RGB
HEAD_BYTES = 512  # from which a file that is no picture is named
BLOCK_ROWS = 256  # converted at a time
ODD_SHAPE_RATIO = 100
EXIF_ORIENTATION = 0x0112
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# The start of a JPEG, PNG, GIF, WebP, TIFF or BMP file in base64.
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK", "Qk0")
_BASE64 = re.compile(r"[A-Za-z0-9+/\-_\s]+=*\s*")
# Raster formats only. Pillow would also run Ghostscript on EPS and try rare decoders with little security testing.
FORMATS = "JPEG PNG WEBP GIF TIFF BMP AVIF JPEG2000 PPM ICO DIB TGA PCX SGI QOI".split()
# Pillow reports camera JPEGs with an embedded preview as MPO.
_JPEG_FAMILY = {"JPEG", "MPO"}
_UPRIGHT_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(RecordError):
    """An unusable image; the message names the file, the problem and the fix."""

    def __init__(self, message: str, code: str = "image-refused"):
        super().__init__(code, message)

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:  # type: ignore[override]
        return type(self), (str(self), self.code)


def resolve_image_path(root: Path, relative: str) -> Path:
    """Returns the real path of `relative` under `root`; an absolute path must also be below the root.

    Raises:
        ImageError: The path is empty or a URL, escapes the root (absolute path, `..` or symbolic link), or is not an
            existing regular file.
    """
    if not relative:
        raise ImageError("an image path is empty; write a path relative to data.image_root", "image-no-path")
    relative = local_path(relative)
    if is_embedded_text(relative):
        raise ImageError(
            f"the image {relative[:30]!r}... is embedded as text; extract it with `bpo convert --images DIR`",
            "image-embedded",
        )
    if scheme := _SCHEME.match(relative):
        if scheme.group(1).lower() in ("http", "https"):
            raise ImageError(
                f"image {relative[:120]!r} is a URL; download it with `bpo convert --fetch-urls --images DIR`",
                "image-url",
            )
        raise ImageError(
            f"image {relative[:120]!r} is at a storage that bpo does not read ({scheme.group()}); copy the files below "
            "data.image_root with the storage's own tool, and write their paths",
            "image-scheme",
        )
    try:
        real_root = Path(root).resolve()
        path = (real_root / relative).resolve()
        is_inside = path.is_relative_to(real_root)
        # Files outside the root are not accessed.
        is_file, exists = is_inside and path.is_file(), is_inside and path.exists()
    except PermissionError as error:  # on a parent folder
        raise ImageError(
            f"image {relative!r} cannot be read ({error.strerror}); check its permissions", "image-unreadable"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:  # link loop, name too long, NUL byte
        raise ImageError(f"image {relative[:120]!r} is not a usable path ({error})", "image-bad-path") from error
    if not is_inside:
        is_absolute = Path(relative).is_absolute()
        how = "is an absolute path outside" if is_absolute else "leads out of"
        raise ImageError(
            f"image {relative!r} {how} data.image_root ({real_root}), to {path}; copy the file below the root or "
            "set a higher root",
            "image-absolute" if is_absolute else "image-outside",
        )
    if not exists:
        hint = _other_spelling(real_root, relative) if real_root.is_dir() else " (which is not a directory)"
        raise ImageError(f"image {relative!r} is missing under data.image_root {real_root}{hint}", "image-missing")
    if not is_file:
        raise ImageError(
            f"image {relative!r} is not a regular file ({path}); write the path of an image file", "image-no-file"
        )
    return path


def _other_spelling(root: Path, relative: str) -> str:
    """Returns a hint if the file, or each of several, exists under another spelling of its path; otherwise ""."""
    slashes = relative.replace("\\", "/")
    name, _, suffix = slashes.rpartition(".")
    spellings = [
        (f"in the Unicode normal form {form}", unicodedata.normalize(form, relative)) for form in ("NFC", "NFD")
    ]
    spellings += [
        ("with slashes", slashes),
        ("not percent-encoded", urllib.parse.unquote(slashes)),
        ("without spaces around it", slashes.strip()),
        ("relative to data.image_root", slashes.removeprefix("./").partition("/")[2]),
        ("with the suffix in another case", f"{name}.{suffix.swapcase()}"),
    ]
    spellings += [(why, unicodedata.normalize(form, text)) for why, text in spellings[2:] for form in ("NFC", "NFD")]
    for text, why in {text: why for why, text in reversed(spellings)}.items():  # each text once: mostly two
        if text != relative and _is_file_below(root, text):
            return f", but {text!r} is there ({why}); write this"
    parts = [part.strip() for part in relative.split(",")]
    if len(parts) > 1 and all(_is_file_below(root, part) for part in parts):
        return f"; write several images as a list, {parts}"
    return ""


def _is_file_below(root: Path, relative: str) -> bool:
    try:
        path = (root / relative).resolve()
        return bool(relative) and path.is_relative_to(root) and path.is_file()
    except (OSError, RuntimeError, ValueError):
        return False


def is_embedded_text(text: str) -> bool:
    """Returns whether the text is an image as a `data:` URL or in base64, not a path."""
    if text.startswith("data:"):
        return True
    return len(text) > 100 and text.lstrip().startswith(_BASE64_STARTS) and _BASE64.fullmatch(text, 0, 400) is not None


def local_path(text: str) -> str:
    """Returns the path of a `file://` URL of this host; any other text unchanged."""
    if text.startswith(("file:///", "file://localhost/")):
        return urllib.parse.unquote(text.removeprefix("file://").removeprefix("localhost"))
    return text


def relative_image_path(root: Path, image: str) -> str:
    """Makes an absolute path below the root relative to it; returns any other path unchanged."""
    path = Path(image)
    if path.is_absolute() and ".." not in path.parts:  # `..` after a symbolic link is not the lexical parent
        for base in (Path(root).absolute(), Path(root).resolve()):
            if path.is_relative_to(base):
                return str(path.relative_to(base))
    return image


def load_image(root: Path, relative: str) -> Image.Image:
    """Loads the first frame of an image as upright 8-bit RGB.

    EXIF orientation is applied. Transparency (alpha channel, palette or colour key) is composited over white. 16-bit
    greyscale is scaled by 255 / 65535; integers beyond 16 bits and floats are scaled from their minimum..maximum
    to 0..255. Colour profiles are not applied.

    Args:
        root: Base folder that no path may escape.
        relative: Path of the image below `root`.

    Raises:
        ImageError: The path is rejected (see `resolve_image_path`), or the file is empty, truncated, not an
            image, or larger than `MAX_PIXELS` pixels.
    """
    return decode_image(read_image_file(root, relative), relative)


def read_image_file(root: Path, relative: str) -> Path:
    """Returns the path of an image file after checking that it is readable and not empty.

    Raises:
        ImageError: See `resolve_image_path`; or the file is empty or unreadable.
    """
    path = resolve_image_path(root, relative)
    try:
        with path.open("rb") as file:
            is_empty = not file.read(1)
    except OSError as error:
        raise ImageError(
            f"image {relative!r} cannot be read ({error.strerror}); check its permissions", "image-unreadable"
        ) from error
    if is_empty:
        raise ImageError(
            f"image {relative!r} is empty (0 bytes); download it again or remove the record", "image-empty"
        )
    return path


def decode_image(source: Path | bytes, name: str, notes: list[str] | None = None) -> Image.Image:
    """Decodes the first frame as `load_image` does, from a file or its content.

    Args:
        source: A validated path, or the file's content.
        name: Name of the image in messages.
        notes: List that receives the codes of harmless anomalies: `image-extension`, `image-shape`.

    Raises:
        ImageError: The source is not an image, truncated, or larger than `MAX_PIXELS` pixels.
    """
    if isinstance(source, bytes) and not source:
        raise ImageError(f"image {name!r} is empty (0 bytes); download it again or remove the record", "image-empty")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as image:
            _check_size(image, name)
            if notes is not None:
                notes += _oddities(image, name)
            image.load()
            return _to_rgb(_upright(image, name))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(name, f"more than {2 * MAX_PIXELS:,}") from error
    except Exception as error:  # decoders raise anything on malformed bytes: OSError, SyntaxError, struct.error
        foreign = foreign_kind(source[:HEAD_BYTES] if isinstance(source, bytes) else _head(source))
        if foreign is not None:
            raise ImageError(f"image {name!r} is {foreign}", "image-undecodable") from error
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "an unknown format" if is_unknown else f"{type(error).__name__}: {error}"
        raise ImageError(
            f"image {name!r} cannot be decoded ({reason}); download it again or remove its record",
            "image-undecodable",
        ) from error


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def data_url(picture: Image.Image) -> str:
    """A data URL of the picture as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def image_bytes_digest(root: Path, relative: str) -> str:
    """Returns the SHA-256 (hex) of the file's bytes, for fingerprints.

    Raises:
        ImageError: The path is rejected or the file cannot be read.
    """
    path = resolve_image_path(root, relative)
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ImageError(
            f"image {relative!r} cannot be read ({error}); check its permissions", "image-unreadable"
        ) from error
    return digest.hexdigest()


def image_identities(images: Iterable[str], image_root: Path) -> list[list[int] | None]:
    """Size in bytes and modification time in nanoseconds of each image file; None for unusable ones."""
    identities: list[list[int] | None] = []
    for image in images:
        try:
            status = resolve_image_path(image_root, image).stat()
        except (ImageError, OSError):
            identities.append(None)  # measured as missing; a file that appears later has an identity
        else:
            identities.append([status.st_size, status.st_mtime_ns])
    return identities


def _check_size(image: Image.Image, relative: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(relative, f"{image.width} x {image.height}")


def _too_large(name: str, size: str) -> ImageError:
    return ImageError(
        f"image {name!r} has {size} pixels, but at most {MAX_PIXELS:,} are decoded, at 3 to 9 bytes each; scale it "
        f"down once (`mogrify -resize {MAX_PIXELS // 10**6}000000@ FILE`): data.max_pixels applies only after decoding",
        "image-too-large",
    )


def _oddities(image: Image.Image, name: str) -> list[str]:
    codes = []
    by_name = Image.registered_extensions().get(Path(name).suffix.lower())
    if by_name is not None and by_name != image.format and {by_name, image.format} - _JPEG_FAMILY:
        codes.append("image-extension")
    if max(image.size) >= ODD_SHAPE_RATIO * min(image.size):
        codes.append("image-shape")
    return codes


def _upright(image: Image.Image, relative: str) -> Image.Image:
    """Applies the EXIF orientation. `ImageOps.exif_transpose` also rewrites the EXIF data, which fails if damaged."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception as error:  # web images often have damaged metadata
        logger.warning("image %r: unreadable EXIF (%s); assuming it is upright", relative, error)
        return image
    method = _UPRIGHT_BY_ORIENTATION.get(orientation)
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bit(image)).convert("RGB")
    if image.has_transparency_data:
        rgb = Image.new("RGB", image.size)
        for top in range(0, image.height, BLOCK_ROWS):  # a whole picture with its copies would take 16 bytes per pixel
            rgba = image.crop((0, top, image.width, min(top + BLOCK_ROWS, image.height))).convert("RGBA")
            white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            rgb.paste(Image.alpha_composite(white, rgba).convert("RGB"), (0, top))
        return rgb
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _to_8_bit(image: Image.Image) -> np.ndarray:
    """Scales greyscale of more than 8 bits to uint8 [height, width]; Pillow's conversion clips at 255."""
    grey_HW = np.asarray(image)
    low, high = float(grey_HW.min()), float(grey_HW.max())
    if not np.isfinite([low, high]).all():  # NaN anywhere makes both NaN
        raise ValueError("it contains NaN or infinite values")
    if image.mode.startswith("I") and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0  # Pillow opens 16-bit files as I;16, or as I for PGM
    factor = 255.0 / (high - low) if high > low else 0.0
    key = image.info.get("transparency")  # transparent grey value of a 16-bit PNG
    scaled_HW = np.empty(grey_HW.shape, np.uint8)
    for start in range(0, len(grey_HW), BLOCK_ROWS):  # a copy in float64 takes 8 bytes per pixel
        block_HW = grey_HW[start : start + BLOCK_ROWS]
        block_8_HW = np.rint((block_HW.astype(np.float64) - low) * factor).astype(np.uint8)
        if isinstance(key, int):
            block_8_HW[block_HW == key] = 255
        scaled_HW[start : start + BLOCK_ROWS] = block_8_HW
    return scaled_HW
