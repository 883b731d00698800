"""Swap: the annotation of another image as the rejected answer, each text as often rejected as preferred.

Then the text alone cannot tell which answer is rejected, and only the image can. Records exchange annotations with
near ones of the same kind of request: at best one object, attribute or count differs.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

import numpy as np

from bpo.bootstrap.changes import language_of, load_lexicon, words_of
from bpo.bootstrap.completion_types import PROVENANCE_SOURCES
from bpo.bootstrap.inject import choose_mode, question_of
from bpo.bootstrap.job.outcomes import Outcome
from bpo.bootstrap.measure.hardness import ObjectTruth
from bpo.bootstrap.reply_forms import expects_yes_or_no, yes_or_no
from bpo.bootstrap.validate import REASONS, count_words, refusal
from bpo.bootstrap.whole_set.content import ContentReader, hash64
from bpo.bootstrap.whole_set.features import ImageFeatures
from bpo.bootstrap.whole_set.images import ImageFacts
from bpo.bootstrap.whole_set.items import FORBIDDEN, Item, Items
from bpo.bootstrap.whole_set.permute import Cost, Order, Search, near_content, permute, rehashed
from bpo.bootstrap.whole_set.sentences import sentence_spans
from bpo.bootstrap.whole_set.takers import NO, SURPLUS, YES, Annotations, Takers
from bpo.config.training import Config
from bpo.job.seeds import derive_seed
from bpo.records import Annotation, Provenance

# Refusals that depend on the text alone: such an annotation is neither given nor gets another.
_OF_TEXT_ALONE = frozenset({"empty", "too-long", "placeholder", "characters", "degenerate", "refusal"})
_QUESTION_WORDS = 2
# Scale of the cosine distance, and planes that sort images.
_IMAGE_COST, _NUM_PLANES = np.float32(100), 24


@dataclass(frozen=True, slots=True)
class SwapPlan:
    """Which record takes whose text.

    Attributes:
        annotations: All annotations, by position.
        seed: Seed of the permutation.
        partner: Position -> position of the record whose text it takes; -1 for none.
        sentence: Position -> number of the sentence that is exchanged; -1 for the whole answer.
        wanted: Position -> `NO`, `YES` or `SURPLUS`.
    """

    annotations: Annotations
    seed: int
    partner: np.ndarray
    sentence: np.ndarray
    wanted: np.ndarray

    def outcome(self, position: int, annotation: Annotation) -> Outcome | None:
        """The negative of a record, its refusal if no text fits, or None if it should not get one."""
        if self.wanted[position] == NO:
            return None
        if self.partner[position] < 0:
            reason = "surplus" if self.wanted[position] == SURPLUS else "no-swap"
            return Outcome(annotation.id, "swap", "refused", reason=reason, detail=REASONS[reason])
        given = int(self.partner[position])
        donor = self.annotations[given]
        text = exchanged(annotation, donor, int(self.sentence[position]), int(self.sentence[given]))
        mode = "answer" if self.sentence[position] < 0 else "sentence"
        provenance = Provenance(PROVENANCE_SOURCES["swap"], mode=mode, seed=self.seed, donor=donor.id)
        return Outcome(annotation.id, "swap", "kept", text, provenance=provenance)


def exchanged(annotation: Annotation, donor: Annotation, sentence: int, sentence_of_donor: int) -> str:
    """The annotation with one sentence replaced by one of the donor; for -1, the whole text of the donor."""
    if sentence < 0:
        return donor.response
    start, end = sentence_spans(annotation.response)[sentence]
    first, last = sentence_spans(donor.response)[sentence_of_donor]
    return annotation.response[:start] + donor.response[first:last] + annotation.response[end:]


def plan_swap(config: Config, annotations: Annotations, takers: Takers) -> SwapPlan:
    """Draws the permutation for the records that take part; see `permute`."""
    read = _Reading(config, annotations, takers.truth)
    wanted = takers.of("swap")
    for position in np.flatnonzero(wanted == YES):
        read.add(int(position), annotations[int(position)])
    read.items.finish()
    options = config.bootstrap.swap
    tie = np.array(read.tie, dtype=np.uint64)
    positions = np.array(read.positions, dtype=np.int64)
    cost, order = _nearness(config, annotations, positions, read.items, tie)
    search = Search(cost, read.fits, order, tie, options.rounds, options.block_size)
    partner = np.full(len(tie), -1)
    for key in (read.key, read.loose_key):
        left = np.flatnonzero(partner < 0)
        found = permute(left, np.array(key, dtype=np.uint64), search)
        partner[left] = found[left]
    whole = np.full(len(annotations), -1, dtype=np.int32)
    matched = partner >= 0
    whole[positions[matched]] = positions[partner[matched]]
    sentence = np.full(len(annotations), -1, dtype=np.int32)
    sentence[positions] = np.array(read.sentence, dtype=np.int32)
    return SwapPlan(annotations, config.bootstrap.seed, whole, sentence, wanted)


def _nearness(
    config: Config, annotations: Annotations, positions: np.ndarray, items: Items, tie: np.ndarray
) -> tuple[Cost, Order]:
    """What makes two records near: the cost of an exchange, and orders in which near ones are adjacent."""
    seed = derive_seed(config.bootstrap.seed, "swap order")

    def at_random(number: int) -> tuple[np.ndarray, ...]:
        return (rehashed(tie, number),)

    def random_cost(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        cost = items.cost(rows, columns)
        noise = rehashed(rehashed(tie[rows], 0)[:, None] ^ tie[columns][None, :], 1) >> np.uint64(56)
        return np.where(cost < FORBIDDEN, noise.astype(np.float32), cost)

    if config.bootstrap.swap.nearest == "random":
        return random_cost, at_random
    if config.bootstrap.swap.nearest == "text":
        return items.cost, near_content(items, seed)
    features = ImageFeatures(config, annotations, positions)

    def image_cost(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        cost = items.cost(rows, columns)
        cost[~features.has[rows]] = FORBIDDEN
        return np.where(cost < FORBIDDEN, _IMAGE_COST * (1 - features.similarity(rows, columns)), cost)

    def by_image(number: int) -> tuple[np.ndarray, ...]:
        return (features.hashes(derive_seed(seed, number), _NUM_PLANES),)

    return image_cost, by_image


class _Reading:
    """Reads the records that take part into items."""

    def __init__(self, config: Config, annotations: Annotations, truth: ObjectTruth | None):
        self._config, self._annotations, self._facts = config, annotations, ImageFacts(truth)
        self._options = config.bootstrap.validate
        # Only for checks of a text alone: any other text is refused for its length.
        self._text_options = replace(self._options, min_length_ratio=1.0, max_length_ratio=1.0)
        self._reader = ContentReader(load_lexicon(self._options.lexicon))
        self._codes: dict[str | None, int] = {None: 0}
        self.items = Items(self._options, config.data.max_completion_words)
        self.positions, self.sentence = array("I"), array("i")
        self.tie, self.key, self.loose_key = array("Q"), array("Q"), array("Q")

    def add(self, position: int, annotation: Annotation) -> None:
        """Adds the record unless its annotation alone would be refused."""
        text = annotation.response
        max_words = self._config.data.max_completion_words
        refused = refusal(text, "", max_words=max_words, options=self._text_options)
        if refused and refused.reason in _OF_TEXT_ALONE:
            return
        seed = derive_seed(self._config.bootstrap.seed, "swap", annotation.id)
        mode = choose_mode("auto", annotation)
        number, place, piece = self._piece(text, seed)
        question = question_of(annotation) if mode == "qa" else ""
        asked = self._reader.read(question, answers_question=True)
        answer = self._reader.read(text, answers_question=mode == "qa")
        content = answer if number < 0 else self._reader.read(piece, answers_question=mode == "qa")
        # "Is it a cat?" and "Is it red or blue?" leave open what they name; "What does the man hold?" does not.
        takes_for_granted = not expects_yes_or_no(question) and "or" not in words_of(question)
        present = self._facts.present(annotation.images)
        named = self._facts.named(text)
        language = language_of(text) if self._options.same_language else (None, None)
        script, language_code = (self._codes.setdefault(name, len(self._codes)) for name in language)
        self.items.append(
            Item(
                words=(*content.words, *self._reader.question_words(question)),
                content=content.said,
                said=answer.implied,
                known=sorted({*answer.implied, *(asked.implied if takes_for_granted else ())}),
                images=self._facts.hashes(annotation.images),
                named=self._facts.named(piece),
                named_by_answer=named,
                true=sorted({*named, *(present or ())}),
                has_truth=present is not None,
                num_words=count_words(piece),
                num_answer_words=count_words(text),
                script=script,
                language=language_code,
            )
        )
        self.positions.append(position)
        self.sentence.append(number)
        self.tie.append(seed)
        question_words = words_of(question)
        kind = (mode, len(annotation.images), number < 0, yes_or_no(text) is None)
        self.key.append(hash64(*kind, place, *question_words))
        # An answer that repeats words of its question fits another question only if it has the same words.
        repeated = sorted({*asked.said} & {*answer.said})
        self.loose_key.append(hash64(*kind, place == "first", *question_words[:_QUESTION_WORDS], *repeated))

    def fits(self, row: int, column: int) -> bool:
        """Whether validation keeps the text of item `column` as the negative of item `row`."""
        annotation, donor = (self._annotations[self.positions[item]] for item in (row, column))
        text = exchanged(annotation, donor, self.sentence[row], self.sentence[column])
        max_words, question = self._config.data.max_completion_words, question_of(annotation)
        refused = refusal(text, annotation.response, max_words=max_words, options=self._options, question=question)
        return refused is None

    def _piece(self, text: str, seed: int) -> tuple[int, str, str]:
        """The text to exchange: the number of a sentence, or -1, its place in the answer, and the text."""
        unit = self._config.bootstrap.swap.unit
        spans = sentence_spans(text) if unit != "answer" else []
        if not spans or (unit == "auto" and len(spans) == 1):
            return -1, "", text
        number = derive_seed(seed, "sentence") % len(spans)
        place = "first" if not number else "last" if number == len(spans) - 1 else f"{2 * number // len(spans)}"
        start, end = spans[number]
        return number, place, text[start:end]
