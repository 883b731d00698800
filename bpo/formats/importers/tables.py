"""Table importer: rows with an image and a text column, such as captions or questions with answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bpo.formats.fields import extra_of, prompt_turns, text_of
from bpo.formats.importers.llava import NO_ANSWER, TEXT_ONLY, conversation_images
from bpo.formats.problems import RecordError
from bpo.records import Annotation

IMAGE_COLUMNS = ("image", "images", "image_path", "file_name", "filename", "filepath", "path", "jpg")
PROMPT_COLUMNS = ("prompt", "question")
CAPTION_COLUMNS = ("caption", "text", "txt")
ANSWER_COLUMNS = ("response", "answer", *CAPTION_COLUMNS, "output", "completion")
DEFAULT_PROMPT = "Describe this image."


def annotation_from_row(obj: Mapping[str, Any], record_id: str, where: str) -> Annotation | str:
    """Converts a row, using the first column present of each kind; the others are kept in `extra`.

    A row without a prompt is a caption with the prompt `DEFAULT_PROMPT`, unless another column may be the question.

    Returns:
        The annotation, `TEXT_ONLY` or `NO_ANSWER`.

    Raises:
        RecordError: Names `where`, the field and the fix.
    """
    names = {kind: _first(obj, columns) for kind, columns in _COLUMNS.items()}
    image, prompt, answer = names["image"], names["prompt"], names["answer"]
    images = conversation_images({"image": obj[image]}, where) if image else ()
    if not images:
        return TEXT_ONLY
    response = text_of(obj[answer], f"field {answer!r}", where) if answer else ""
    if not response.strip():
        return NO_ANSWER
    question = text_of(obj[prompt], f"field {prompt!r}", where) if prompt else DEFAULT_PROMPT
    extra = extra_of(obj, {"id", *(name for name in names.values() if name)}, where)
    if not prompt and (lost := _question_in(extra, answer in CAPTION_COLUMNS)):
        raise RecordError(
            "missing-field",
            f"{where}: no field has the name of a question, but {lost!r} may be one; rename it to 'question', or "
            "remove it if there is none",
        )
    return Annotation(record_id, images, prompt_turns(question, len(images), where), response.strip(), extra)


_COLUMNS = {"image": IMAGE_COLUMNS, "prompt": PROMPT_COLUMNS, "answer": ANSWER_COLUMNS}


def _question_in(others: Mapping[str, Any], is_caption: bool) -> str | None:
    """Returns the column that may hold the question: one of several words next to an answer, or one that asks."""
    texts = {name: value.strip() for name, value in others.items() if isinstance(value, str)}
    return next((name for name, text in texts.items() if text.endswith("?") or (not is_caption and " " in text)), None)


def _first(obj: Mapping[str, Any], columns: tuple[str, ...]) -> str | None:
    return next((name for name in columns if obj.get(name) not in (None, "", [])), None)
