"""Which spaCy models are taken, and what their nouns and similarities are."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bpo.evaluation.tagging import prepare_words

META = {
    "lang": "en",
    "name": "core_web_lg",
    "version": "3.8.0",
    "pipeline": ["tagger", "lemmatizer"],
    "vectors": {"width": 300, "vectors": 5},
}


@pytest.fixture
def spacy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module in place of spaCy, and one in place of NLTK."""
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: known("json" if name in ("spacy", "nltk") else name))
    for name in ("spacy", "nltk"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return sys.modules["spacy"]


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, meta: Any, name: str = "en_core_web_lg") -> None:
    """A package that must not be imported; None has no metadata."""
    package = folder / name
    data = package / f"{name}-3.8.0"
    data.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('this package was imported')")
    if meta is not None:
        for place in (package, data):
            (place / "meta.json").write_text(json.dumps(meta))
    monkeypatch.syspath_prepend(str(folder))


def refusal(model: str, tagger: Any = "spacy") -> str:
    with pytest.raises(ValueError) as found:
        prepare_words(model, tagger)
    return str(found.value)


def test_an_installed_model_is_named_with_its_version_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spacy: ModuleType
) -> None:
    install(tmp_path, monkeypatch, META)
    assert prepare_words("en_core_web_lg", "spacy")[0] == "en_core_web_lg-3.8.0"


def test_a_folder_is_taken(tmp_path: Path, spacy: ModuleType) -> None:
    (tmp_path / "meta.json").write_text(json.dumps({**META, "name": "core_web_md"}))
    assert prepare_words(str(tmp_path), "spacy")[0] == "en_core_web_md-3.8.0"


@pytest.mark.parametrize(
    "meta, message",
    [
        (None, "so this is not a spaCy model"),
        ({**META, "name": "other"}, "this is not spaCy's model 'en_core_web_lg'"),
        ([], "not the metadata of a spaCy model"),
    ],
)
def test_a_package_that_only_has_the_name_of_a_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spacy: ModuleType, meta: Any, message: str
) -> None:
    install(tmp_path, monkeypatch, meta)
    text = refusal("en_core_web_lg")
    assert message in text and "python -m spacy download en_core_web_lg" in text and "never by name from PyPI" in text


def test_a_model_that_is_not_installed_is_refused_with_the_way_to_get_it(spacy: ModuleType) -> None:
    text = refusal("en_core_web_lg_of_nobody")
    assert "neither installed nor a folder" in text and "python -m spacy download en_core_web_lg_of_nobody" in text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vectors": {"width": 0, "vectors": 0}}, "has no word vectors; install one with `python -m spacy download"),
        ({"pipeline": ["tok2vec"]}, "not an English pipeline with tagger and lemmatizer"),
        ({"lang": "de"}, "not an English pipeline"),
    ],
)
def test_a_model_that_cannot_do_it_is_refused(
    tmp_path: Path, spacy: ModuleType, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "meta.json").write_text(json.dumps(META | change))
    assert message in refusal(str(tmp_path))


@pytest.mark.parametrize("package", ["spacy", "nltk"])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else known("json"))
    assert f"pip install {package}" in refusal(str(tmp_path), "nltk")


def test_missing_data_of_nltk_are_found_before_any_question_is_asked(tmp_path: Path, spacy: ModuleType) -> None:
    def word_tokenize(text: str) -> list[str]:
        raise LookupError("punkt_tab")

    nltk: Any = sys.modules["nltk"]
    nltk.word_tokenize = nltk.pos_tag = word_tokenize
    nltk.stem = SimpleNamespace(WordNetLemmatizer=SimpleNamespace)
    (tmp_path / "meta.json").write_text(json.dumps(META))
    assert re.search("python -m nltk.downloader punkt_tab .* wordnet", refusal(str(tmp_path), "nltk"))


class FakeDocument:
    def __init__(self, word: str):
        self.word, self.vector_norm = word, 0.0 if word == "unseen" else 1.0

    def similarity(self, other: FakeDocument) -> float:
        return 0.75 if self.vector_norm and other.vector_norm else -1.0


class FakePipeline:
    """Words of more than three letters are nouns; lemmas lack the last letter and are in lower case."""

    def __call__(self, text: str) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(text=word, lemma_=word[:-1].lower(), tag_="NNS" if len(word) > 3 else "VB")
            for word in text.split()
        ]

    def make_doc(self, word: str) -> FakeDocument:
        return FakeDocument(word)


def test_nouns_are_lemmas_but_words_with_capitals_stay(tmp_path: Path, spacy: ModuleType) -> None:
    spacy.load = lambda folder, exclude: FakePipeline()  # type: ignore[attr-defined]
    (tmp_path / "meta.json").write_text(json.dumps(META))
    words = prepare_words(str(tmp_path), "spacy")[1]()
    assert list(words.nouns("Trees and dogs run")) == ["Trees", "dog"]
    assert [words.similarity("dog", other) for other in ("cat", "dog", "unseen")] == [0.75, 1.0, 0.0]
    assert words.similarity("unseen", "unseen") == 1.0


@pytest.mark.skipif("BPO_SPACY_MODEL" not in os.environ, reason="needs a spaCy model with vectors in BPO_SPACY_MODEL")
def test_a_real_model() -> None:
    pytest.importorskip("spacy", reason="needs spaCy")
    label, load = prepare_words(os.environ["BPO_SPACY_MODEL"], "spacy")
    words = load()
    assert label.startswith("en_")
    assert list(words.nouns("Two dogs run behind a red boat. Trees stand near.")) == ["dog", "boat", "Trees"]
    assert words.similarity("dog", "cat") > words.similarity("dog", "building") and words.similarity("x", "x") == 1.0
