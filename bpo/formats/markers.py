"""The `<image>` marker of LLaVA's files: text with markers to structured content.

Only the import formats that define the marker come through here. Anywhere else the literal string is somebody's text.
"""

from __future__ import annotations

from collections.abc import Sequence

from bpo.records import ContentPart, Role, Turn

IMAGE_MARKER = "<image>"
IMAGE_PART = ContentPart("image")


def place_images(turns: Sequence[tuple[Role, str]], num_images: int) -> tuple[Turn, ...]:
    """Structured turns in which exactly `num_images` image parts stand.

    - Markers in user turns stand for the images in order, as many as there are images; any further occurrence
      stays literal text, and so does every occurrence in a system or assistant turn.
    - One image goes to the front of the turn with its marker, as in LLaVA's own preprocessing; several stay
      where their markers are.
    - Images without a marker go to the front of the first user turn, before the marked ones there: the order of
      the image parts is the order of the images.

    Args:
        turns: (role, text) in order; at least one user turn.
        num_images: Images of the record.

    Raises:
        ValueError: There are images and no user turn.
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
                # Only the marker and the line break it stood on go; the text on both sides is joined as LLaVA does.
                parts = [IMAGE_PART, *_text_part(text.replace(IMAGE_MARKER, "", 1).strip())]
            parts = [IMAGE_PART] * num_unmarked + parts
            num_unmarked = 0
        else:
            parts = _text_part(text)
        result.append(Turn(role, tuple(parts)))
    return tuple(result)


def _split_at_markers(text: str, max_markers: int) -> tuple[list[ContentPart], int]:
    """Parts of `text` cut at its first `max_markers` markers, and how many were used."""
    pieces = text.split(IMAGE_MARKER, max_markers) if max_markers else [text]
    parts: list[ContentPart] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append(IMAGE_PART)
        # The line breaks that set a marker apart belong to the file format; chat templates write their own.
        parts.extend(_text_part(piece.strip("\n") if len(pieces) > 1 else piece))
    return parts, len(pieces) - 1


def _text_part(text: str) -> list[ContentPart]:
    return [ContentPart("text", text)] if text.strip() else []
