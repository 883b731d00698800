"""The texts that records exchange, in a temporary file, and the cost of giving one record the text of another.

Shape letters: R rows (records that take a text), C columns (texts), V distinct tokens.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from bpo.bootstrap.whole_set.content import CONTENT, NEIGHBOURS, QUESTION, RELATION, STRONG, STYLE, UNKNOWN, class_of
from bpo.config.bootstrap import ValidateConfig

# Cost of a pair that must not be made. Costs below it are exact in float32.
FORBIDDEN = 1 << 16
# Costs are in words that differ; a content word counts as several words of style, and the order counts too.
_WEIGHTS = ((STYLE, 1.0), (CONTENT, 4.0), (NEIGHBOURS, 1.0), (QUESTION, 1.0))
# Of pairs whose text may be true of the image: it only adds to the annotation; all that it adds are names that the
# lexicon does not know; all that it adds are relations.
_ADDS_ONLY_COST, _UNKNOWN_ONLY_COST, _RELATIONS_ONLY_COST = np.float32(6), np.float32(2), np.float32(24)
# Added to both lengths of the ratio, as in validate.py.
_FREE_WORDS = 8
_ITEMS_PER_CHUNK = 1 << 14


@dataclass(frozen=True, slots=True)
class Item:
    """One text that a record gives to another: its annotation, or a sentence of it.

    Attributes:
        words: Tokens of the text's words, and of the question.
        content: Tokens of what the text says.
        said: Tokens of what the whole annotation says, all of which is true of the image.
        known: Tokens of `said`, and of what the question takes for granted.
        images: A hash of each image.
        named: Objects that the text names, by the lexicon of the ground truth.
        named_by_answer: Objects that the whole annotation names, by the same lexicon.
        true: Objects in the images, by ground truth or by the annotation.
        has_truth: Whether there is ground truth for the images.
        num_words: Number of words of the text.
        num_answer_words: Number of words of the whole annotation.
        script, language: Numbers of the annotation's script and language; 0 if unknown.
    """

    words: Sequence[int]
    content: Sequence[int]
    said: Sequence[int]
    known: Sequence[int]
    images: Sequence[int]
    named: Sequence[int]
    named_by_answer: Sequence[int]
    true: Sequence[int]
    has_truth: int
    num_words: int
    num_answer_words: int
    script: int
    language: int


_NAMES = tuple(entry.name for entry in fields(Item))
_LISTS = _NAMES[:8]


class Items:
    """All items of a job, 8 bytes of memory each.

    Args:
        options: Limits that a negative must meet.
        max_words: `data.max_completion_words`.
        order_by: List of an item by which `minhash` compares items.
    """

    def __init__(self, options: ValidateConfig, max_words: int, order_by: Literal["content", "said"] = "content"):
        self._options, self._max_words, self._order_by = options, max_words, _LISTS.index(order_by)
        self._file = tempfile.TemporaryFile(prefix="bpo-items-")  # noqa: SIM115 open as long as this object
        self._starts = array("Q", [0])
        self._tokens: np.ndarray = np.empty(0, np.uint32)

    def append(self, item: Item) -> None:
        lists = [getattr(item, name) for name in _LISTS]
        facts = [getattr(item, name) for name in _NAMES[len(_LISTS) :]]
        entry = array("I", [*map(len, lists), *facts])
        for tokens in lists:
            entry.extend(tokens)
        self._file.write(entry.tobytes())
        self._starts.append(self._starts[-1] + len(entry))

    def finish(self) -> None:
        """Makes the items readable; no more can be added."""
        self._file.flush()
        if self._starts[-1]:
            self._tokens = np.asarray(np.memmap(self._file, dtype=np.uint32, mode="r"))  # slices of arrays are faster

    def __len__(self) -> int:
        return len(self._starts) - 1

    def minhash(self, salt: int) -> np.ndarray:
        """For each item, the least hash of a list; equal for two items with a chance of their Jaccard index."""
        least = np.full(len(self), 0xFFFFFFFF, dtype=np.uint32)
        starts = np.array(self._starts, dtype=np.int64)
        for first in range(0, len(self), _ITEMS_PER_CHUNK):
            begin = starts[first : min(first + _ITEMS_PER_CHUNK, len(self))]
            counts = self._tokens[begin + self._order_by].astype(np.int64)
            before = self._tokens[begin[:, None] + np.arange(self._order_by)].sum(axis=1, dtype=np.int64)
            offset = begin + len(_NAMES) + before
            has = np.flatnonzero(counts)
            if not len(has):
                continue
            ends = np.cumsum(counts[has])
            within = np.arange(ends[-1]) - np.repeat(ends - counts[has], counts[has])
            hashed = _mixed(self._tokens[np.repeat(offset[has], counts[has]) + within], salt)
            least[first + has] = np.minimum.reduceat(hashed, ends - counts[has])
        return least

    def cost(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """[R, C] float32: the distance of both texts in words; `FORBIDDEN` for a pair that must not be made."""
        taking, given = _Block(self._of(rows)), _Block(self._of(columns))
        cost = np.zeros((len(rows), len(columns)), dtype=np.float32)
        changed = np.zeros_like(cost)
        for kind, weight in _WEIGHTS:
            common = taking.common("words", given, "words", kind)
            before, after = taking.size("words", kind)[:, None], given.size("words", kind)[None, :]
            cost += np.float32(weight) * (before + after - 2 * common)
            if kind in (STYLE, CONTENT):
                changed += np.maximum(before, after) - common
        new = {
            kind: given.size("content", kind)[None, :] - taking.common("said", given, "content", kind)
            for kind in (STRONG, RELATION, UNKNOWN)
        }
        loses = taking.size("content")[:, None] > taking.common("content", given, "content")
        # A name that the lexicon does not know may be a synonym; it counts if it replaces another word.
        unknown = (new[UNKNOWN] > 0) & loses
        weak = new[STRONG] == 0
        cost += _ADDS_ONLY_COST * ~loses + np.where(unknown, _UNKNOWN_ONLY_COST, _RELATIONS_ONLY_COST) * weak
        forbidden = (weak & (new[RELATION] == 0) & ~unknown) | (changed < self._options.min_changed_words)
        # "The man holds a cup" says nothing more than "a cup" to "What does the man hold?".
        forbidden |= given.size("content")[None, :] == taking.common("known", given, "content")
        forbidden |= taking.common("images", given, "images") > 0
        forbidden |= self._wrong_length(taking, given) | _is_true(taking, given)
        if self._options.same_language:
            for name in ("script", "language"):
                ours, theirs = taking.fact(name)[:, None], given.fact(name)[None, :]
                forbidden |= (ours != theirs) & (ours > 0) & (theirs > 0)
        np.minimum(cost, FORBIDDEN / 2, out=cost)
        cost[forbidden] = FORBIDDEN
        return cost

    def _wrong_length(self, taking: _Block, given: _Block) -> np.ndarray:
        before = taking.fact("num_answer_words")[:, None].astype(np.float64)
        after = before - taking.fact("num_words")[:, None] + given.fact("num_words")[None, :]
        ratio = (after + _FREE_WORDS) / (before + _FREE_WORDS)
        inside = (ratio >= self._options.min_length_ratio) & (ratio <= self._options.max_length_ratio)
        return ~inside | (after > self._max_words)

    def _of(self, numbers: np.ndarray) -> list[np.ndarray]:
        return [self._tokens[self._starts[int(i)] : self._starts[int(i) + 1]] for i in numbers]


def _is_true(taking: _Block, given: _Block) -> np.ndarray:
    """[R, C]: whether the text names objects that the annotation does not, all of them in the image by ground truth."""
    has_truth = taking.fact("has_truth")[:, None] > 0
    if not has_truth.any():
        return has_truth
    named = given.size("named")[None, :]
    adds = named > taking.common("named_by_answer", given, "named")
    return has_truth & adds & (named == taking.common("true", given, "named"))


class _Block:
    """The lists and facts of a few items."""

    def __init__(self, entries: Sequence[np.ndarray]):
        self._num = len(entries)
        heads = np.array([entry[: len(_NAMES)] for entry in entries], dtype=np.int64)
        self._facts = {name: heads[:, index] for index, name in enumerate(_NAMES)}
        joined = np.concatenate([entry[len(_NAMES) :] for entry in entries])
        # Which item and which list each token belongs to.
        list_of_token = np.repeat(np.tile(np.arange(len(_LISTS)), self._num), heads[:, : len(_LISTS)].ravel())
        item_of_token = np.repeat(np.arange(self._num), heads[:, : len(_LISTS)].sum(axis=1))
        self._tokens = {
            name: (joined[list_of_token == index], item_of_token[list_of_token == index])
            for index, name in enumerate(_LISTS)
        }

    def fact(self, name: str) -> np.ndarray:
        return self._facts[name]

    def size(self, name: str, kind: int | None = None) -> np.ndarray:
        """Number of tokens of a list, or of those of a class."""
        return np.bincount(self._list(name, kind)[1], minlength=self._num).astype(np.float32)

    def common(self, name: str, other: _Block, name_of_other: str, kind: int | None = None) -> np.ndarray:
        """[R, C] float32: number of tokens in a list of ours and in a list of theirs; no list repeats a token."""
        (ours, our_item), (theirs, their_item) = self._list(name, kind), other._list(name_of_other, kind)
        shared = np.intersect1d(ours, theirs)
        left, right = (
            _indicators(shared, tokens, item, num)
            for tokens, item, num in ((ours, our_item, self._num), (theirs, their_item, other._num))
        )
        product: np.ndarray = left @ right.T
        return product

    def _list(self, name: str, kind: int | None) -> tuple[np.ndarray, np.ndarray]:
        tokens, item = self._tokens[name]
        if kind is None:
            return tokens, item
        chosen = class_of(tokens) == kind
        return tokens[chosen], item[chosen]


def _indicators(vocabulary: np.ndarray, tokens: np.ndarray, item: np.ndarray, num: int) -> np.ndarray:
    """[num, V] float32: 1 where an item has a token of the sorted vocabulary."""
    matrix = np.zeros((num, len(vocabulary)), dtype=np.float32)
    if len(vocabulary):
        place = np.minimum(np.searchsorted(vocabulary, tokens), len(vocabulary) - 1)
        has = vocabulary[place] == tokens
        matrix[item[has], place[has]] = 1
    return matrix


def _mixed(tokens: np.ndarray, salt: int) -> np.ndarray:
    """A bijection of 32-bit numbers for each salt (the finaliser of MurmurHash3)."""
    mixed = tokens ^ np.uint32(salt & 0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    mixed = mixed ^ (mixed >> np.uint32(16))
    return mixed
