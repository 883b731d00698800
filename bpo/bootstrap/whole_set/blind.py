"""Words that the model finds plausible in a slot of an annotation without seeing the image, for `edit`.

The model sees other records' images, never none or a black one, as in `bpo.bootstrap.measure.blind`.

Shape letters: N items, W words.
"""

from __future__ import annotations

import logging
import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from bpo.bootstrap.job.outcomes import Outcome
from bpo.bootstrap.measure.margins import log_mean_probability
from bpo.bootstrap.whole_set.content import hash64
from bpo.bootstrap.whole_set.items import FORBIDDEN
from bpo.bootstrap.whole_set.permute import Cost
from bpo.bootstrap.whole_set.sentences import sentence_spans
from bpo.bootstrap.whole_set.slots import Slot, SlotFinder, phrase_of, put
from bpo.bootstrap.whole_set.takers import Annotations
from bpo.config.training import Config
from bpo.data.encode import EncodedGroup, EncodedImages, EncodingError
from bpo.formats.images import ImageError, image_bytes_digest, load_image
from bpo.job.seeds import derive_seed
from bpo.model.group_scores import GroupScorer
from bpo.records import Annotation

logger = logging.getLogger(__name__)

# Log-probability, relative to the word taken out, of words that were not scored or are less plausible.
FLOOR = -12.0
# Cost, in words that differ, of one nat: plausibility decides, and nearness between words of like plausibility.
_WORDS_PER_NAT = np.float32(16)
# Annotations whose words are counted, and images of which each record is shown some.
_COUNTED, _NUM_IMAGES = 20_000, 32


def frequent_words(config: Config, annotations: Annotations) -> dict[str, list[str]]:
    """Form -> the most frequent words with which annotations take part, of an evenly spaced sample."""
    finder = SlotFinder(config)
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for position in range(0, len(annotations), max(1, len(annotations) // _COUNTED)):
        annotation = annotations[position]
        if found := finder.choose(annotation):
            counts[found[1].form][phrase_of(annotation.response, found[1])] += 1
    ranked = {form: sorted(count, key=lambda word: (-count[word], word)) for form, count in counts.items()}
    return {form: words[: config.bootstrap.edit.blind_words] for form, words in ranked.items()}


class BlindScores:
    """For the first slot of each record, log-probabilities of frequent words of its form, relative to its own word.

    Each is the log of the mean over `blind_images` other records' images of the probability of the rest of the
    sentence from the slot on, given the answer before it.

    Args:
        annotations: All annotations of the job.

    Raises:
        ValueError: Not one image of the annotations can be read.
    """

    whole_batches = True

    def __init__(self, config: Config, annotations: Annotations, scorer: GroupScorer):
        self._config, self._scorer, self._encoder = config, scorer, scorer.encoder
        self._finder, self._words = SlotFinder(config), frequent_words(config, annotations)
        self._images = self._read_images(annotations)

    def prepare(self, annotation: Annotation) -> list[EncodedImages] | str:
        """Other records' images for each pass, or why one of the record's own cannot be read."""
        root, num_images = self._encoder.image_root, len(annotation.images)
        if not num_images:
            return []
        try:
            for image in annotation.images:
                load_image(root, image)
            own = {image_bytes_digest(root, image) for image in annotation.images}
            others = [digest for digest in self._images if digest not in own]
            random.Random(derive_seed(self._config.bootstrap.seed, "edit images", annotation.id)).shuffle(others)
            num_passes = min(self._config.bootstrap.edit.blind_images, len(others) // num_images)
            shown = [others[n * num_images : (n + 1) * num_images] for n in range(num_passes)]
            return [self._encoded(digests) for digests in shown]
        except ImageError as error:
            return str(error)

    def outcomes(self, batch: Sequence[Annotation], prepared: Sequence[list[EncodedImages] | str]) -> Iterator[Outcome]:
        words: dict[int, list[str]] = {}
        groups: list[tuple[int, EncodedGroup]] = []
        for index, (annotation, images) in enumerate(zip(batch, prepared, strict=True)):
            _, slot = self._finder.choose(annotation) or (-1, None)
            try:
                if isinstance(images, str):
                    raise EncodingError(images)
                words[index] = self._words_for(annotation, slot) if slot else []
                if slot and len(words[index]) > 1:
                    groups += [(index, group) for group in self._groups(annotation, slot, words[index], images)]
            except EncodingError as error:
                yield Outcome(annotation.id, "edit", "broken", reason=str(error))
                continue
        num_passes = Counter(index for index, _ in groups)
        for index in words:
            if not num_passes[index]:
                yield Outcome(batch[index].id, "edit", "scored", scores={})
        logp: defaultdict[int, list[list[float]]] = defaultdict(list)
        for index, _, values in self._scorer.score(groups, self._config.measure.max_micro_batch_tokens):
            logp[index].append([float(values_N.double().sum()) for values_N in values])
            if len(logp[index]) == num_passes[index]:
                own, *others = (log_mean_probability(by_image) for by_image in zip(*logp.pop(index), strict=True))
                scores = {w: round(value - own, 3) for w, value in zip(words[index][1:], others, strict=True)}
                yield Outcome(batch[index].id, "edit", "scored", scores=scores)

    def _words_for(self, annotation: Annotation, slot: Slot) -> list[str]:
        """The word taken out, then those to compare with it."""
        own = phrase_of(annotation.response, slot)
        return [own, *(word for word in self._words.get(slot.form, ()) if word != own)]

    def _groups(
        self, annotation: Annotation, slot: Slot, words: Sequence[str], images: Sequence[EncodedImages]
    ) -> Iterator[EncodedGroup]:
        """For each of the `images`, the prompt with them, and the annotation with each word as a completion.

        The completions end with the slot's sentence. Tokens that all begin with belong to the prompt, which is computed
        once; without room for more, there is no group.
        """
        text = annotation.response
        end = next(end for _, end in sentence_spans(text) if end >= slot.end)
        after, encode = len(text) - end, self._encoder.encode_completion
        edits = [put(text, slot, word) for word in words]
        ids = [encode(edited[: len(edited) - after])[:-1] for edited in edits]  # without the end token
        last = min(map(len, ids)) - 1
        num_common = next((n for n in range(last) if len({each[n] for each in ids}) > 1), last)
        for shown in images:
            prompt = self._encoder.encode_prompt(annotation.id, shown, annotation.prompt)
            room = self._encoder.max_length_tokens - len(prompt.prefix_ids)
            if room <= num_common:
                continue
            prompt = replace(prompt, prefix_ids=(*prompt.prefix_ids, *ids[0][:num_common]))
            yield EncodedGroup(prompt, tuple(each[num_common:room] for each in ids), (0.0,) * len(ids))

    def _encoded(self, digests: Sequence[str]) -> EncodedImages:
        if len(digests) == 1:
            return self._images[digests[0]][1]
        return self._encoder.encode_images([self._images[digest][0] for digest in digests])

    def _read_images(self, annotations: Annotations) -> dict[str, tuple[str, EncodedImages]]:
        """Digest of the content -> path and model inputs of images of records drawn at random."""
        draw = random.Random(derive_seed(self._config.bootstrap.seed, "edit images"))
        found: dict[str, tuple[str, EncodedImages]] = {}
        error: ImageError | None = None
        for position in draw.sample(range(len(annotations)), min(8 * _NUM_IMAGES, len(annotations))):
            for image in annotations[position].images[: _NUM_IMAGES - len(found)]:
                try:
                    digest = image_bytes_digest(self._encoder.image_root, image)
                    if digest not in found:
                        found[digest] = image, self._encoder.encode_images([image])
                except ImageError as unreadable:
                    error = unreadable
        if error and not found:
            raise ValueError(f"bootstrap.edit.by is blind, but no image of the annotations can be read: {error}")
        if len(found) <= self._config.bootstrap.edit.blind_images:
            logger.warning("edit: only %d different images; words are compared under fewer of them", len(found))
        return found


class Plausibility:
    """Scores of the items that exchange words; 2 bytes per item and word, and 8 per item.

    Args:
        num_words: Most words scored for one form.
    """

    def __init__(self, num_words: int):
        self._num_words = num_words
        self._column: dict[int, int] = {}
        self._num_of_form: Counter[str] = Counter()
        self._own, self._rows = array("Q"), bytearray()

    def append(self, form: str, own: str, scores: Mapping[str, float]) -> None:
        """Adds an item that gives away the word `own`.

        Args:
            scores: Words -> log-probability in its slot, relative to `own`.
        """
        row_W = np.full(self._num_words + 1, FLOOR, dtype=np.float16)
        for word, value in scores.items():
            key = hash64(form, word)
            if key not in self._column:
                self._column[key] = self._num_of_form[form]
                self._num_of_form[form] += 1
            row_W[self._column[key]] = max(value, FLOOR)
        self._own.append(hash64(form, own))
        self._rows += row_W.tobytes()

    def added_to(self, cost: Cost) -> Cost:
        """The cost of an exchange with that of implausible words, once all items are added."""
        values_NW = np.frombuffer(self._rows, dtype=np.float16).reshape(-1, self._num_words + 1)
        column_N = np.array([self._column.get(own, self._num_words) for own in self._own], dtype=np.int64)

        def both(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
            found = cost(rows, columns)
            scores = values_NW[np.ix_(rows, column_N[columns])].astype(np.float32)
            return np.where(found < FORBIDDEN, found - _WORDS_PER_NAT * scores, found)

        return both
