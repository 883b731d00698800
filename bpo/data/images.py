"""Safe image loading: a path that stays under the image root, any kind of photograph to 8-bit RGB.

Images come from other people's lists, so a path may point anywhere and a file may hold anything. Every refusal
is an `ImageError` that names the file and the fix.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

MAX_PIXELS = 89_478_485  # Pillow's own bound: 256 MiB of RGB
EXIF_ORIENTATION = 0x0112
_UPRIGHT_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that cannot be used: the message names the file, what is wrong and what to do."""


def resolve_image_path(root: Path, relative: str) -> Path:
    """The real path of `relative` under `root`.

    Raises:
        ImageError: The path is empty, a URL or absolute, leaves the root (by `..` or a symbolic link), or is
            not an existing regular file.
    """
    if not relative:
        raise ImageError("an image path is empty; name a file relative to data.image_root")
    if "://" in relative or relative.startswith("data:"):
        raise ImageError(f"image {relative[:120]!r} is a URL; download it and give its path under data.image_root")
    if Path(relative).is_absolute():
        raise ImageError(f"image {relative!r} is an absolute path; give it relative to data.image_root ({root})")
    try:
        real_root = Path(root).resolve()
        path = (real_root / relative).resolve()
        is_file, exists = path.is_file(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # link loop, name too long, NUL byte
        raise ImageError(f"image {relative[:120]!r} is not a usable path ({error})") from error
    if not path.is_relative_to(real_root):
        raise ImageError(
            f"image {relative!r} leads out of data.image_root ({real_root}) to {path}; "
            "copy the file below the root or choose a higher root"
        )
    if not exists:
        hint = "" if real_root.is_dir() else " (data.image_root itself is not a directory)"
        raise ImageError(f"image {relative!r} is missing under data.image_root {real_root}{hint}")
    if not is_file:
        raise ImageError(f"image {relative!r} is not a regular file ({path}); name the image inside it")
    return path


def load_image(root: Path, relative: str) -> Image.Image:
    """The first frame of an image as 8-bit RGB, upright.

    EXIF orientation is applied. Transparency (alpha channel, palette or colour key) is laid over white. 16-bit
    greyscale is scaled by 255 / 65535; integers beyond 16 bits and floats from their own minimum..maximum
    to 0..255. Colour profiles are not applied.

    Args:
        root: Folder that no path may leave.
        relative: Path of the image below it.

    Raises:
        ImageError: The path is refused (see `resolve_image_path`), or the file is empty, truncated, not an
            image, or larger than `MAX_PIXELS` pixels.
    """
    path = resolve_image_path(root, relative)
    if path.stat().st_size == 0:
        raise ImageError(f"image {relative!r} is empty (0 bytes); fetch it again or remove its record")
    try:
        with Image.open(path) as image:
            _check_size(image, relative)
            image.load()
            return _to_rgb(_upright(image, relative))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"image {relative!r} is too large ({error}); scale it down") from error
    except Exception as error:  # decoders meet hostile bytes and raise anything: OSError, SyntaxError, struct.error
        raise ImageError(
            f"image {relative!r} cannot be decoded ({type(error).__name__}: {error}); "
            "fetch it again or remove its record"
        ) from error


def image_bytes_digest(root: Path, relative: str) -> str:
    """SHA-256 (hex) of the file's bytes, for fingerprints.

    Raises:
        ImageError: The path is refused or the file cannot be read.
    """
    path = resolve_image_path(root, relative)
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ImageError(f"image {relative!r} cannot be read ({error}); check its permissions") from error
    return digest.hexdigest()


def _check_size(image: Image.Image, relative: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            f"image {relative!r} is too large: {image.width} x {image.height} is more than {MAX_PIXELS} pixels "
            "(a decompression bomb?); scale it down"
        )


def _upright(image: Image.Image, relative: str) -> Image.Image:
    """Apply the EXIF orientation; `ImageOps.exif_transpose` also rewrites the EXIF block and fails on damaged ones."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception as error:  # damaged metadata round a sound picture is common on the web
        logger.warning("image %r: unreadable EXIF (%s); taken as upright", relative, error)
        return image
    method = _UPRIGHT_BY_ORIENTATION.get(orientation)
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bit(image)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _to_8_bit(image: Image.Image) -> np.ndarray:
    """Greyscale of more than 8 bits as uint8 [height, width]; Pillow's own conversion clips at 255."""
    grey_HW = np.asarray(image).astype(np.float64)
    if not np.isfinite(grey_HW).all():
        raise ValueError("it holds NaN or infinite values")
    low, high = float(grey_HW.min()), float(grey_HW.max())
    if image.mode.startswith("I") and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0  # 16-bit files arrive as I;16 or, from PGM, as I
    span = high - low
    scaled_HW = (grey_HW - low) * (255.0 / span if span > 0 else 0.0)
    return np.rint(scaled_HW).astype(np.uint8)
