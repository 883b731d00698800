"""Balanced edits: one word of the annotation exchanged, each word put in as often as it is taken out.

Records exchange words of one form with records of near texts, so that no word tells which answer is rejected.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bpo.bootstrap.changes import load_lexicon
from bpo.bootstrap.completion_types import PROVENANCE_SOURCES
from bpo.bootstrap.inject import choose_mode, question_of
from bpo.bootstrap.job.outcomes import Outcome
from bpo.bootstrap.seeds import derive_seed
from bpo.bootstrap.validate import REASONS, content_key, count_words, refusal
from bpo.bootstrap.whole_set.content import ContentReader, hash64
from bpo.bootstrap.whole_set.images import ImageFacts
from bpo.bootstrap.whole_set.items import Item, Items
from bpo.bootstrap.whole_set.permute import Search, near_content, permute
from bpo.bootstrap.whole_set.slots import Slot, edited, find_slots
from bpo.bootstrap.whole_set.takers import NO, SURPLUS, YES, Annotations, Takers
from bpo.config.training import Config
from bpo.records import Annotation, Provenance

# Slots of a record that are tried in turn.
_ATTEMPTS = 3
_ROUNDS, _BLOCK_SIZE = 4, 128


@dataclass(frozen=True, slots=True)
class EditPlan:
    """Which record takes whose word.

    Attributes:
        partner: Position -> position of the record whose word it takes; -1 for none.
        slot: Position -> number of the slot that is exchanged.
        wanted: Position -> `NO`, `YES` or `SURPLUS`.
    """

    config: Config
    annotations: Annotations
    partner: np.ndarray
    slot: np.ndarray
    wanted: np.ndarray

    def outcome(self, position: int, annotation: Annotation) -> Outcome | None:
        """The negative of a record, its refusal if no word fits, or None if it should not get one."""
        if self.wanted[position] == NO:
            return None
        given = int(self.partner[position])
        if given < 0:
            reason = "surplus" if self.wanted[position] == SURPLUS else "no-edit"
            return Outcome(annotation.id, "edit", "refused", reason=reason, detail=REASONS[reason])
        donor, slots = self.annotations[given], SlotFinder(self.config)
        slot = slots.of(annotation)[self.slot[position]]
        text = edited(annotation.response, slot, donor.response, slots.of(donor)[self.slot[given]])
        seed = self.config.bootstrap.seed
        provenance = Provenance(PROVENANCE_SOURCES["edit"], mode=slot.kind, seed=seed, donor=donor.id)
        return Outcome(annotation.id, "edit", "kept", text, provenance=provenance)


def plan_edit(
    config: Config, annotations: Annotations, takers: Takers, taken: Callable[[int, Annotation], str | None]
) -> EditPlan:
    """Draws the permutation of words for the records that take part.

    Args:
        taken: (position, record) -> another negative of the record, which an edit must not repeat; None for none.
    """
    wanted = takers.of("edit")
    partner = np.full(len(annotations), -1, dtype=np.int32)
    slot = np.full(len(annotations), -1, dtype=np.int32)
    for attempt in range(_ATTEMPTS):
        read = _Reading(config, annotations, takers, taken)
        for position in np.flatnonzero((wanted == YES) & (partner < 0)):
            read.add(int(position), annotations[int(position)], attempt)
        read.items.finish()
        tie = np.array(read.tie, dtype=np.uint64)
        order = near_content(read.items, derive_seed(config.bootstrap.seed, "edit order"))
        search = Search(read.items.cost, read.fits, order, tie, _ROUNDS, _BLOCK_SIZE)
        found = permute(np.arange(len(tie)), np.array(read.key, dtype=np.uint64), search)
        positions = np.array(read.positions, dtype=np.int64)
        matched = found >= 0
        partner[positions[matched]] = positions[found[matched]]
        slot[positions[matched]] = np.array(read.slot, dtype=np.int32)[matched]
    return EditPlan(config, annotations, partner, slot, wanted)


class SlotFinder:
    """Finds the slots of annotations under the options of a job."""

    def __init__(self, config: Config):
        self._lexicon = load_lexicon(config.bootstrap.validate.lexicon)
        self._kinds = frozenset(config.bootstrap.edit.kinds)

    def of(self, annotation: Annotation) -> list[Slot]:
        return find_slots(annotation.response, self._lexicon, self._kinds)


class _Reading:
    """Reads one slot of each record that takes part into items."""

    def __init__(
        self,
        config: Config,
        annotations: Annotations,
        takers: Takers,
        taken: Callable[[int, Annotation], str | None],
    ):
        self._config, self._annotations, self._taken = config, annotations, taken
        self._options = config.bootstrap.validate
        self._facts = ImageFacts(takers.truth)
        self._reader, self._slots = ContentReader(load_lexicon(self._options.lexicon)), SlotFinder(config)
        self.items = Items(self._options, config.data.max_completion_words, order_by="said")
        self.positions, self.slot = array("I"), array("i")
        self.tie, self.key = array("Q"), array("Q")

    def add(self, position: int, annotation: Annotation, attempt: int) -> None:
        """Adds slot number `attempt` of the record, in a random order by kind; nothing if it has fewer."""
        slots = self._slots.of(annotation)
        seed = derive_seed(self._config.bootstrap.seed, "edit", annotation.id)
        mode = choose_mode("auto", annotation)
        question = self._reader.read(question_of(annotation), answers_question=True) if mode == "qa" else None
        number = self._choose(slots, seed, attempt, set(question.said) if question else set())
        if number is None:
            return
        text, slot = annotation.response, slots[number]
        answer = self._reader.read(text, answers_question=True)
        word = self._reader.read(slot.word, answers_question=True)
        named = self._facts.named(text)
        present = self._facts.present(annotation.images)
        self.items.append(
            Item(
                words=answer.words,
                content=word.said,
                said=answer.implied,
                known=answer.implied,
                images=self._facts.hashes(annotation.images),
                named=self._facts.named(slot.word),
                named_by_answer=named,
                true=sorted({*named, *(present or ())}),
                has_truth=present is not None,
                num_words=count_words(slot.word),
                num_answer_words=count_words(text),
                script=0,
                language=0,
            )
        )
        self.positions.append(position)
        self.slot.append(number)
        self.tie.append(seed)
        self.key.append(hash64(mode, slot.form))

    def _choose(self, slots: list[Slot], seed: int, attempt: int, asked: set[int]) -> int | None:
        """The number of a slot: kinds in random order, then the slots of each; those in the question are left out."""
        free = [
            number
            for number, slot in enumerate(slots)
            if not asked.intersection(self._reader.read(slot.word, answers_question=True).said)
        ]
        by_kind: dict[str, list[int]] = {}
        for number in sorted(free, key=lambda number: derive_seed(seed, "slot", number)):
            by_kind.setdefault(slots[number].kind, []).append(number)
        kinds = sorted(by_kind, key=lambda kind: derive_seed(seed, "kind", kind))
        # One slot of each kind before the second of any.
        ranked = sorted((place, kinds.index(kind), n) for kind in kinds for place, n in enumerate(by_kind[kind]))
        return ranked[attempt][2] if attempt < len(ranked) else None

    def fits(self, row: int, column: int) -> bool:
        """Whether validation keeps item `row`'s text with the word of item `column`."""
        position, given = self.positions[row], self.positions[column]
        annotation, donor = self._annotations[position], self._annotations[given]
        slot, donor_slot = self._slots.of(annotation)[self.slot[row]], self._slots.of(donor)[self.slot[column]]
        text = edited(annotation.response, slot, donor.response, donor_slot)
        max_words, question = self._config.data.max_completion_words, question_of(annotation)
        if refusal(text, annotation.response, max_words=max_words, options=self._options, question=question):
            return False
        other = self._taken(position, annotation)
        return other is None or content_key(other) != content_key(text)
