"""Nouns of English text and similarity of words: spaCy, or NLTK for the nouns. Both are optional.

A spaCy model is identified by its metadata before any of its code could run, and loaded from its files: packages on
PyPI with the names of spaCy's models are not spaCy's, which are not published there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from bpo.formats.jsonfiles import parse_json

NounTagger = Literal["spacy", "nltk"]
_NLTK_DATA = "punkt_tab averaged_perceptron_tagger_eng wordnet"
_NEEDED = ("tagger", "lemmatizer")


@dataclass(frozen=True, slots=True)
class Words:
    """What is known about words.

    Attributes:
        nouns: Text -> its nouns in order, as lemmas; words with capital letters stay as written.
        similarity: Two words -> cosine of their vectors; 1 for equal words, otherwise 0 if one has no vector.
    """

    nouns: Callable[[str], Sequence[str]]
    similarity: Callable[[str, str], float]


def prepare_words(model: str, tagger: NounTagger) -> tuple[str, Callable[[], Words]]:
    """Checks that the model is there, without loading it.

    Args:
        model: Name of an installed spaCy model, or its folder (with `meta.json`).
        tagger: `spacy` takes nouns from the model; `nltk` takes them from NLTK's tagger and WordNet's lemmas.

    Returns:
        Name and version of what is used, and a function that loads it.

    Raises:
        ValueError: A package, a model or its word vectors are missing, with the command that installs it.
    """
    for package in ("spacy", tagger):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed; `pip install {package}` (the extra `amber` has spaCy)")
    folder = Path(model) if Path(model).is_dir() else _installed_folder(model)
    meta = _read_meta(folder)
    if meta.get("lang") != "en" or not set(_NEEDED) <= set(meta.get("pipeline", ())):
        raise ValueError(f"{folder / 'meta.json'}: not an English pipeline with {' and '.join(_NEEDED)}")
    if not meta.get("vectors", {}).get("vectors"):
        raise ValueError(f"spaCy model {model!r} has no word vectors; {_download('en_core_web_lg')}")
    label = f"en_{meta.get('name')}-{meta.get('version')}"
    if tagger == "nltk":
        _check_nltk()
        label = f"nltk, {label}"
    return label, partial(_load, folder, tagger)


def _download(model: str) -> str:
    return (
        f"install one with `python -m spacy download {model}`, never by name from PyPI: "
        "packages there that look like spaCy's models are not spaCy's"
    )


def _installed_folder(model: str) -> Path:
    """Folder with the files of an installed model, found without importing the package."""
    spec = importlib.util.find_spec(model) if model.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"spaCy model {model!r} is neither installed nor a folder; {_download(model)}")
    package = Path(spec.submodule_search_locations[0])
    meta = _read_meta(package)
    if f"{meta.get('lang')}_{meta.get('name')}" != model:
        raise ValueError(
            f"{package / 'meta.json'}: this is not spaCy's model {model!r}; remove it and {_download(model)}"
        )
    return package / f"{model}-{meta.get('version')}"


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        meta = parse_json(path.read_bytes(), str(path))
    except OSError as error:
        reason = f"{path} cannot be read ({error.strerror}), so this is not a spaCy model"
        raise ValueError(f"{reason}; {_download('en_core_web_lg')}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{path}: not the metadata of a spaCy model; {_download('en_core_web_lg')}")
    return meta


def _check_nltk() -> None:
    try:
        _nltk_nouns("A dog.")
    except LookupError as error:
        raise ValueError(f"data of NLTK are missing; `python -m nltk.downloader {_NLTK_DATA}`") from error


def _nltk_nouns(text: str) -> list[str]:
    import nltk

    lemmatizer = nltk.stem.WordNetLemmatizer()
    tagged = nltk.pos_tag(nltk.word_tokenize(text))
    return [lemmatizer.lemmatize(word) for word, tag in tagged if tag.startswith("NN")]


def _load(folder: Path, tagger: NounTagger) -> Words:
    import spacy

    pipeline = spacy.load(folder, exclude=["ner"])

    def spacy_nouns(text: str) -> list[str]:
        nouns = (token for token in pipeline(text) if token.tag_.startswith("NN"))
        return [noun.lemma_ if noun.text.islower() else noun.text for noun in nouns]

    document = cache(pipeline.make_doc)

    @cache
    def similarity(first: str, second: str) -> float:
        if first == second:
            return 1.0
        one, other = document(first), document(second)
        return float(one.similarity(other)) if one.vector_norm and other.vector_norm else 0.0

    return Words(_nltk_nouns if tagger == "nltk" else spacy_nouns, similarity)
