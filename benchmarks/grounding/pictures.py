"""Pictures made by others: glyphs of a colour emoji font, photographs and textures, from packages with free licences.

Noto Color Emoji (Debian `fonts-noto-color-emoji`, OFL 1.1), photographs of `mate-backgrounds` (Debian, GPL 2 or later),
the textures brick and gravel of scikit-image (CC0). Nothing of them is part of this repository.

Shapes: H, W pixels; C colour channels.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
PHOTOS = Path("/usr/share/backgrounds/mate/nature")
_FONT_SIZE = 109  # the only size of the font's bitmaps
_CANVAS_PX = 128
HUES = {"red": 0.0, "yellow": 0.14, "green": 0.36, "blue": 0.6}
_MIN_SATURATION = 60  # of 255: pixels below are black, white or grey and keep their hue


def check_sources() -> None:
    """Raises FileNotFoundError with the command that installs what is missing."""
    textures = _textures()
    missing = [str(path) for path in (FONT, PHOTOS, textures) if path is None or not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"missing: {', '.join(missing)}; run `apt-get install fonts-noto-color-emoji mate-backgrounds` and "
            "`pip install -c constraints.txt -e '.[grounding]'`"
        )


def _textures() -> Path | None:
    spec = find_spec("skimage")
    return Path(spec.submodule_search_locations[0]) / "data" if spec and spec.submodule_search_locations else None


@cache
def glyph(character: str, colour: str | None, side_px: int) -> Image.Image:
    """An emoji as an RGBA image of `side_px`, cut to its ink, its saturated pixels moved to the hue of `colour`."""
    canvas = Image.new("RGBA", (_CANVAS_PX + 16, _CANVAS_PX + 16))
    font = ImageFont.truetype(str(FONT), _FONT_SIZE)
    ImageDraw.Draw(canvas).text((0, 0), character, font=font, embedded_color=True)
    ink = canvas.crop(canvas.getbbox())
    if colour is not None:
        ink = _recoloured(ink, HUES[colour])
    scale = side_px / max(ink.size)
    size = (max(1, round(ink.width * scale)), max(1, round(ink.height * scale)))
    return ink.resize(size, Image.Resampling.LANCZOS)


def _recoloured(picture: Image.Image, hue: float) -> Image.Image:
    hsv_HWC = np.array(picture.convert("RGB").convert("HSV"))
    hsv_HWC[..., 0] = np.where(hsv_HWC[..., 1] > _MIN_SATURATION, round(255 * hue), hsv_HWC[..., 0])
    recoloured = Image.fromarray(hsv_HWC, "HSV").convert("RGB")
    recoloured.putalpha(picture.getchannel("A"))
    return recoloured


@cache
def _photograph(name: str) -> Image.Image:
    folder = _textures() if name.endswith(".png") else PHOTOS
    assert folder is not None
    picture = Image.open(folder / name).convert("RGB")
    picture.thumbnail((640, 640), Image.Resampling.LANCZOS)
    return picture


def background(name: str, side_px: int, rng: np.random.Generator) -> Image.Image:
    """A random square part of a photograph or texture, two fifths to two thirds of its shorter side, or its mirror."""
    picture = _photograph(name)
    shorter = min(picture.size)
    length = int(shorter * rng.uniform(0.4, 0.67))
    left, top = (int(rng.integers(0, size - length + 1)) for size in picture.size)
    part = picture.crop((left, top, left + length, top + length)).resize((side_px, side_px), Image.Resampling.BICUBIC)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part
