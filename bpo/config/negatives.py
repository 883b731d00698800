"""Options of the sources that choose a negative for all records at once, at the merge: `swap` and `edit`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bpo.config.options import Section, check, number

EditKind = Literal["object", "attribute", "count", "relation", "polarity"]

# Made at the merge from the whole set, not record by record in the work queue.
WHOLE_SET_SOURCES = ("swap", "edit")


@dataclass(kw_only=True)
class SwapConfig(Section):
    """Negatives that are annotations of other images (type `swap`): each text is as often rejected as preferred.

    Attributes:
        nearest: Which annotations to prefer: near in words (`text`), of images with similar features in the vision
            tower of `model.path` (`image`), or any that fits (`random`).
        unit: What is exchanged: the whole `answer`, or one `sentence` of it at a similar place; `auto` exchanges a
            sentence of answers that have several.
        only_missing: Make a negative only for records that have none from another source.
        block_size: Number of records among which partners are exchanged at a time; more finds nearer ones, slower.
        rounds: Number of times that all records are arranged into new blocks; more finds nearer partners, slower.
    """

    where = "bootstrap.swap"

    nearest: Literal["text", "image", "random"] = "text"
    unit: Literal["answer", "sentence", "auto"] = "answer"
    only_missing: bool = False
    block_size: int = number(128, at_least=2, at_most=4096)
    rounds: int = number(4, at_least=1, at_most=100)


@dataclass(kw_only=True)
class EditConfig(Section):
    """Negatives with one word exchanged (type `edit`): each word is put in as often as it is taken out.

    Attributes:
        by: Which exchanges to prefer: between near texts, by `lexicon` alone, or of words that `model.path` finds
            plausible in their new place without the image (`blind`), which takes a pass over all records.
        kinds: Kinds of words to exchange.
        only_missing: Make a negative only for records that have none from another source.
        blind_images: Number of other records' images under which the model's blind probability is averaged.
        blind_words: Number of words per kind and form whose blind probability is computed, the most frequent ones.
    """

    where = "bootstrap.edit"

    by: Literal["lexicon", "blind"] = "lexicon"
    kinds: list[EditKind] = field(default_factory=lambda: ["object", "attribute", "count", "relation"])
    only_missing: bool = False
    blind_images: int = number(4, at_least=1, at_most=32)
    blind_words: int = number(24, at_least=2, at_most=256)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            len(self.kinds) == len(set(self.kinds)) and bool(self.kinds),
            "bootstrap.edit.kinds must not be empty or contain duplicates",
        )
