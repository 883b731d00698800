"""Converts text with LLaVA's `<image>` markers to structured content.

Used only by import formats that define the marker. In all other formats `<image>` is literal text.
"""

from __future__ import annotations

from collections.abc import Sequence

from bpo.records import ContentPart, Role, Turn

IMAGE_MARKER = "<image>"
IMAGE_PART = ContentPart("image")


def place_images(turns: Sequence[tuple[Role, str]], num_images: int) -> tuple[Turn, ...]:
    """Returns structured turns with exactly `num_images` image parts.

    - The first `num_images` markers in user turns are replaced by image parts, in order. Further markers, and all
      markers in system and assistant turns, remain literal text.
    - A single image moves to the front of the turn with its marker, as in LLaVA's preprocessing; several images stay
      at their markers.
    - Images without a marker go to the front of the first user turn, before the marked images. The image parts keep
      the order of the images.

    Args:
        turns: (role, text) in order; at least one user turn.
        num_images: Number of images in the record.

    Raises:
        ValueError: There are images but no user turn.
    """
    num_markers = sum(text.count(IMAGE_MARKER) for role, text in turns if role == "user")
    num_unmarked = max(0, num_images - num_markers)
    num_marked = num_images - num_unmarked
    if num_images and all(role != "user" for role, _ in turns):
        raise ValueError("there are images but no user turn to hold them; add a user turn")
    result = []
    for role, text in turns:
        parts: list[ContentPart] = []
        if role == "user":
            parts, num_used = _split_at_markers(text, num_marked)
            num_marked -= num_used
            if num_images == 1 and num_used:
                # Remove the marker and its line break only; join the text on both sides as LLaVA does.
                parts = [IMAGE_PART, *_text_part(text.replace(IMAGE_MARKER, "", 1).strip())]
            parts = [IMAGE_PART] * num_unmarked + parts
            num_unmarked = 0
        else:
            parts = _text_part(text)
        result.append(Turn(role, tuple(parts)))
    return tuple(result)


def _split_at_markers(text: str, max_markers: int) -> tuple[list[ContentPart], int]:
    """Splits `text` at its first `max_markers` markers; returns the parts and the number of markers used."""
    pieces = text.split(IMAGE_MARKER, max_markers) if max_markers else [text]
    parts: list[ContentPart] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append(IMAGE_PART)
        # Line breaks around a marker belong to the file format; chat templates add their own.
        parts.extend(_text_part(piece.strip("\n") if len(pieces) > 1 else piece))
    return parts, len(pieces) - 1


def _text_part(text: str) -> list[ContentPart]:
    return [ContentPart("text", text)] if text.strip() else []
