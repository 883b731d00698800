"""Balanced edits: one word of the annotation exchanged, each word put in as often as it is taken out.

Records exchange words of one form with records of near texts, so that no word tells which answer is rejected.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from bpo.bootstrap.changes import load_lexicon
from bpo.bootstrap.completion_types import PROVENANCE_SOURCES
from bpo.bootstrap.inject import choose_mode, question_of
from bpo.bootstrap.job.outcomes import Outcome
from bpo.bootstrap.validate import REASONS, content_key, count_words, refusal
from bpo.bootstrap.whole_set.blind import Plausibility
from bpo.bootstrap.whole_set.content import ContentReader, hash64
from bpo.bootstrap.whole_set.images import ImageFacts
from bpo.bootstrap.whole_set.items import Item, Items
from bpo.bootstrap.whole_set.permute import Search, near_content, permute
from bpo.bootstrap.whole_set.slots import SlotFinder, phrase_of, put
from bpo.bootstrap.whole_set.takers import NO, SURPLUS, YES, Annotations, Takers
from bpo.config.training import Config
from bpo.job.seeds import derive_seed
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
        text = put(annotation.response, slot, phrase_of(donor.response, slots.of(donor)[self.slot[given]]))
        is_blind = self.config.bootstrap.edit.by == "blind"
        provenance = Provenance(
            PROVENANCE_SOURCES["edit"],
            model=self.config.model.path if is_blind else None,
            mode=f"blind-{slot.kind}" if is_blind else slot.kind,
            seed=self.config.bootstrap.seed,
            donor=donor.id,
        )
        return Outcome(annotation.id, "edit", "kept", text, provenance=provenance)


def plan_edit(
    config: Config,
    annotations: Annotations,
    takers: Takers,
    taken: Callable[[int, Annotation], str | None],
    scores_of: Callable[[Annotation], Mapping[str, float] | None],
) -> EditPlan:
    """Draws the permutation of words for the records that take part.

    Args:
        taken: (position, record) -> another negative of the record, which an edit must not repeat; None for none.
        scores_of: Blind log-probabilities of words in the record's first slot; None if there are none yet, and so no
            edit of the record. Used by `bootstrap.edit.by: blind`.
    """
    wanted = takers.of("edit")
    is_blind = config.bootstrap.edit.by == "blind"
    partner = np.full(len(annotations), -1, dtype=np.int32)
    slot = np.full(len(annotations), -1, dtype=np.int32)
    for attempt in range(_ATTEMPTS):
        read = _Reading(config, annotations, takers, taken)
        for position in np.flatnonzero((wanted == YES) & (partner < 0)):
            annotation = annotations[int(position)]
            scores = scores_of(annotation) if is_blind else {}
            if scores is None:
                wanted[position] = NO
            else:
                read.add(int(position), annotation, attempt, {} if attempt else scores)
        read.items.finish()
        tie = np.array(read.tie, dtype=np.uint64)
        order = near_content(read.items, derive_seed(config.bootstrap.seed, "edit order"))
        cost = read.plausible.added_to(read.items.cost) if read.plausible else read.items.cost
        search = Search(cost, read.fits, order, tie, _ROUNDS, _BLOCK_SIZE)
        found = permute(np.arange(len(tie)), np.array(read.key, dtype=np.uint64), search)
        positions = np.array(read.positions, dtype=np.int64)
        matched = found >= 0
        partner[positions[matched]] = positions[found[matched]]
        slot[positions[matched]] = np.array(read.slot, dtype=np.int32)[matched]
    return EditPlan(config, annotations, partner, slot, wanted)


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
        options = config.bootstrap.edit
        self.plausible = Plausibility(options.blind_words) if options.by == "blind" else None
        self.positions, self.slot = array("I"), array("i")
        self.tie, self.key = array("Q"), array("Q")

    def add(self, position: int, annotation: Annotation, attempt: int, scores: Mapping[str, float]) -> None:
        """Adds slot number `attempt` of the record, in a random order by kind; nothing if it has fewer.

        Args:
            scores: Blind log-probabilities of words in the slot.
        """
        found = self._slots.choose(annotation, attempt)
        if found is None:
            return
        number, slot = found
        text = annotation.response
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
        self.tie.append(derive_seed(self._config.bootstrap.seed, "edit", annotation.id))
        self.key.append(hash64(choose_mode("auto", annotation), slot.form))
        if self.plausible:
            self.plausible.append(slot.form, phrase_of(text, slot), scores)

    def fits(self, row: int, column: int) -> bool:
        """Whether validation keeps item `row`'s text with the word of item `column`."""
        position, given = self.positions[row], self.positions[column]
        annotation, donor = self._annotations[position], self._annotations[given]
        slot, donor_slot = self._slots.of(annotation)[self.slot[row]], self._slots.of(donor)[self.slot[column]]
        text = put(annotation.response, slot, phrase_of(donor.response, donor_slot))
        max_words, question = self._config.data.max_completion_words, question_of(annotation)
        if refusal(text, annotation.response, max_words=max_words, options=self._options, question=question):
            return False
        other = self._taken(position, annotation)
        return other is None or content_key(other) != content_key(text)
