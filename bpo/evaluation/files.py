"""COCO instances and captions as ground truth, synonyms, and checks of fields that readers of benchmarks share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpo.evaluation.benchmark import Question
from bpo.formats.jsonfiles import parse_json
from bpo.formats.lexicon import ObjectLexicon, build_lexicon


@dataclass(frozen=True, slots=True)
class CocoImages:
    """Images with their ground truth.

    Attributes:
        file_of_image: Image id -> file name, relative to data.image_root, in file order.
        present_of_image: Image id -> objects in it.
        lexicon: Names of objects.
    """

    file_of_image: dict[int | str, str]
    present_of_image: dict[int | str, frozenset[str]]
    lexicon: ObjectLexicon


def read_coco(instances: Path, captions: Path | None = None, synonyms: Path | None = None) -> CocoImages:
    """Reads COCO instances, and captions whose objects also count as present.

    Args:
        instances: JSON object with `images`, `annotations` and `categories`.
        captions: JSON object whose `annotations` have `image_id` and `caption`; captions of other images are ignored.
        synonyms: One object per line; without it, objects are found by category name only.

    Raises:
        ValueError: A record is invalid; names file, record, field and fix.
    """
    tree = _read_object(instances, ("images", "annotations", "categories"))
    name_of_category = _table(tree["categories"], f"{instances}, categories", "id", "name")
    file_of_image = _table(tree["images"], f"{instances}, images", "id", "file_name")
    lexicon = read_synonyms(synonyms) if synonyms else build_lexicon([name] for name in name_of_category.values())
    categories_of_image: dict[int | str, list[str]] = {image_id: [] for image_id in file_of_image}
    for number, entry in enumerate(tree["annotations"]):
        where = f"{instances}, annotations[{number}]"
        image_id, category = id_field(entry, "image_id", where), id_field(entry, "category_id", where)
        if image_id not in file_of_image or category not in name_of_category:
            raise ValueError(f"{where}: image_id {image_id!r} or category_id {category!r} is not declared; add it")
        categories_of_image[image_id].append(name_of_category[category])
    captions_of_image: dict[int | str, list[str]] = {image_id: [] for image_id in file_of_image}
    if captions is not None:
        for number, entry in enumerate(_read_object(captions, ("annotations",))["annotations"]):
            where = f"{captions}, annotations[{number}]"
            image_id, caption = id_field(entry, "image_id", where), text_field(entry, "caption", where)
            if image_id in captions_of_image:
                captions_of_image[image_id].append(caption)
        if not any(captions_of_image.values()):
            raise ValueError(f"{captions}: no caption is about an image of {instances}; use the same split for both")
    try:
        present = {
            image_id: present_objects(lexicon, categories_of_image[image_id], captions_of_image[image_id])
            for image_id in file_of_image
        }
    except ValueError as error:
        raise ValueError(f"{instances} with {synonyms or 'its own category names'}: {error}") from error
    return CocoImages(file_of_image, present, lexicon)


def read_synonyms(path: Path) -> ObjectLexicon:
    """Reads one object per line, canonical name first, names separated by commas; skips blank lines.

    Raises:
        ValueError: The file is invalid; names it and the fix.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        return build_lexicon([n for n in line.split(",") if n.strip()] for line in lines if line.strip(" \t,"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check the option synonyms") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def present_objects(
    lexicon: ObjectLexicon, instances: Iterable[str] = (), captions: Iterable[str] = ()
) -> frozenset[str]:
    """Objects of an image: the categories of its instances and the objects in its ground-truth captions.

    Raises:
        ValueError: A category is not in the lexicon.
    """
    present = set()
    for category in instances:
        canonical = lexicon.canonical(category)
        if canonical is None:
            raise ValueError(f"category {category!r} is not in the synonyms; add a line for it")
        present.add(canonical)
    for caption in captions:
        present.update(mention.object for mention in lexicon.mentions(caption))
    return frozenset(present)


def _read_object(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        tree = parse_json(Path(path).read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check the path") from error
    for key in keys:
        if not isinstance(tree, dict) or not isinstance(tree.get(key), list):
            raise ValueError(f"{path}: list {key!r} is missing; use a file in COCO format")
    return tree


def _table(entries: list[Any], where: str, key: str, value: str) -> dict[int | str, str]:
    table = {
        id_field(entry, key, f"{where}[{number}]"): text_field(entry, value, f"{where}[{number}]")
        for number, entry in enumerate(entries)
    }
    if len(table) != len(entries):
        ((repeated, _),) = Counter(entry[key] for entry in entries).most_common(1)
        raise ValueError(f"{where}: id {repeated!r} is used twice; make ids unique")
    return table


def id_field(entry: Any, key: str, where: str) -> int | str:
    """The field `key` of a record, which must be text or an integer.

    Raises:
        ValueError: It is not; names `where` and the field.
    """
    value = entry.get(key) if isinstance(entry, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{where}: field {key!r} is {value!r}; it must be text or an integer")
    return value


def text_field(entry: Any, key: str, where: str) -> str:
    """The field `key` of a record, which must be text.

    Raises:
        ValueError: It is not; names `where` and the field.
    """
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {key!r} is {value!r}; it must be text")
    return value


def unique_ids(questions: Sequence[Question], where: str) -> None:
    """Checks that no two questions have the same id.

    Raises:
        ValueError: Two have; names `where` and the id.
    """
    counts = Counter(question.id for question in questions)
    if len(counts) != len(questions):
        ((repeated, _),) = counts.most_common(1)
        raise ValueError(f"{where}: question id {repeated!r} is used twice; make ids unique")
