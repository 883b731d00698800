"""Image markers and chat tokens in the text of prompts: one rule for every format.

In a user turn given as text, `<image>` marks an image. In a turn given as a list of parts, image parts do, and
`<image>` is literal text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from bpo.formats.problems import RecordError
from bpo.records import ContentPart, Role, Turn

IMAGE_MARKER = "<image>"
IMAGE_PART = ContentPart("image")
# Content of a turn as read: text, or parts.
Content = str | tuple[ContentPart, ...]

# Control tokens of chat templates.
CHAT_TOKEN = r"<[|｜][\w ▁]{1,40}[|｜]>|<(?:bos|eos|start_of_turn|end_of_turn|end_of_utterance)>|\[/?INST\]|<</?SYS>>"
# Image markers of other tools, which would be trained as literal text.
_FOREIGN = re.compile(
    r"<\|(?:im(?:g|age)\w*|vision_start)\|>|<I(?:mage|MAGE)(?:Here|Content)?>|<image(?:_placeholder|[ _]?\d+)>"
    r"|<(?:IMG_CONTEXT|start_of_image|image_soft_token)>|<img\s[^>]*src\s*=|!\[[^\]]*\]\([^)]+\)"
)
# Qwen-VL's path in the text: an image even if the record names none.
_PATH_IN_TEXT = re.compile(r"<img>[^<>]+</img>")
_OTHER_MEDIA = re.compile(r"<(?:video|audio)>|<\|(?:video|audio)(?:_pad|_\d+)?\|>")
_CHAT_TOKEN = re.compile(CHAT_TOKEN)
_USER_LABEL = re.compile(r"(?:^|\s)(?:USER|HUMAN|###\s*(?:User|Human|Instruction))\s*:|^\s*(?:User|Human)\s*:", re.M)
_ANSWER_LABEL = re.compile(r"(?:^|\s)(?:ASSISTANT|###\s*(?:Assistant|Response))\s*:|^\s*Assistant\s*:", re.M)
# In an answer, markers of media and placeholders of boxes, which other trainers replace.
_IN_ANSWER = re.compile(
    r"<(?:image|video|audio|bbox|ref-object)>|<box>|<\|(?:image_pad|video_pad|vision_start|box_start|object_ref_start)\|>"
)


def place_images(turns: Sequence[tuple[Role, Content]], num_images: int, where: str) -> tuple[Turn, ...]:
    """Returns structured turns with exactly `num_images` image parts.

    - Markers in the text of user turns are replaced by image parts, in order. In system and assistant turns, and in
      turns with parts, they remain literal text.
    - A single image moves to the front of the turn with its marker, as in LLaVA's preprocessing; several images stay
      at their markers.
    - Images without a marker go to the front of the first user turn, before the marked images, unless there are image
      parts. The image parts keep the order of the images.

    Args:
        turns: (role, text or parts) in order.
        num_images: Number of images in the record.
        where: File, record and id, for messages.

    Raises:
        RecordError: More images are marked than the record has; image parts do not match the images; there is no user
            turn for the images; a text has another tool's markers, or is a prompt rendered by a chat template.
    """
    user_texts = [content for role, content in turns if role == "user" and isinstance(content, str)]
    num_markers = sum(text.count(IMAGE_MARKER) for text in user_texts)
    num_parts = sum(part.type == "image" for _, content in turns if not isinstance(content, str) for part in content)
    if num_markers + num_parts > num_images or (num_parts and num_markers + num_parts < num_images):
        raise RecordError(
            "image-parts",
            f"{where}: the prompt has {num_parts} image parts and {num_markers} {IMAGE_MARKER} markers for "
            f"{num_images} images; make the numbers equal (without any, the images come first; in a turn given as "
            f"parts, {IMAGE_MARKER} is text)",
        )
    if num_images and all(role != "user" for role, _ in turns):
        raise RecordError("turn-order", f"{where}: there are images but no user turn to hold them; add a user turn")
    _refuse_rendered([content for role, content in turns if role == "user"], where)
    for text in user_texts:
        _refuse_other_markers(text, num_images, where)
    num_unmarked = num_images - num_markers - num_parts
    result = []
    for role, content in turns:
        parts = list(content) if not isinstance(content, str) else _text_part(content)
        if role == "user":
            if isinstance(content, str) and IMAGE_MARKER in content:
                parts = _split_at_markers(content, alone=num_images == 1)
            parts = [IMAGE_PART] * num_unmarked + parts
            num_unmarked = 0
        result.append(Turn(role, tuple(parts)))
    return tuple(result)


def refuse_marked_answer(answers: Sequence[str], where: str) -> None:
    """Raises RecordError if an answer contains a marker of an image, video, audio or box, or several chat tokens."""
    for answer in answers:
        # A search of every answer costs more than this test.
        if "<" not in answer:
            continue
        tokens = _CHAT_TOKEN.findall(answer)
        if (found := _IN_ANSWER.search(answer)) or len(tokens) > 1:
            token = found.group() if found else tokens[0]
            raise RecordError("marker-in-answer", f"{where}: an answer contains {token!r}, which is not text")


def _refuse_other_markers(text: str, num_images: int, where: str) -> None:
    # Most texts have none of the characters with which a marker begins; searching costs more than this test.
    if "<" not in (rest := text.replace(IMAGE_MARKER, "")) and "![" not in rest:
        return
    if found := _OTHER_MEDIA.search(text):
        raise RecordError("other-media", f"{where}: the prompt refers to a video or audio: {found.group()!r}")
    found = _PATH_IN_TEXT.search(text) or (_FOREIGN.search(text) if num_images else None)
    if found:
        raise RecordError(
            "foreign-marker",
            f"{where}: the prompt marks an image as {found.group()!r}, which would be trained as text; write "
            f"{IMAGE_MARKER} and name the file in 'images' (or give the turn as parts to keep the text)",
        )


def _refuse_rendered(contents: Sequence[Content], where: str) -> None:
    """Refuses a prompt that a chat template has rendered: the model's own template would render it twice."""
    for content in contents:
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        rest = text.replace(IMAGE_MARKER, "")
        if "<" not in rest and ":" not in rest and "[" not in rest:
            continue
        found = [match.group() for match in _CHAT_TOKEN.finditer(text)]
        labels = [match.group().strip() for pattern in (_USER_LABEL, _ANSWER_LABEL) if (match := pattern.search(text))]
        for signs in (found, labels):
            if len(signs) > 1:
                raise RecordError(
                    "rendered-prompt",
                    f"{where}: the prompt contains {signs[0]!r} and {signs[1]!r}: a chat template has rendered it "
                    "already; write the question alone",
                )


def _split_at_markers(text: str, *, alone: bool) -> list[ContentPart]:
    """Splits `text` at its markers; the marker of the record's only image moves to the front."""
    if alone:
        # Remove the marker and its line break only; join the text on both sides as LLaVA does.
        return [IMAGE_PART, *_text_part(text.replace(IMAGE_MARKER, "", 1).strip())]
    parts: list[ContentPart] = []
    for number, piece in enumerate(text.split(IMAGE_MARKER)):
        if number:
            parts.append(IMAGE_PART)
        # Line breaks around a marker belong to the file format; chat templates add their own.
        parts.extend(_text_part(piece.strip("\r\n")))
    return parts


def _text_part(text: str) -> list[ContentPart]:
    return [ContentPart("text", text)] if text.strip() else []
