"""Warnings about the text measures of a type of rejected answers: what is wrong, how sure that is, what to do."""

from __future__ import annotations

from collections.abc import Iterator

from bpo.bootstrap.completion_types import COMPLETION_TYPES
from bpo.bootstrap.measure.discriminator import Telling, TextTest
from bpo.bootstrap.measure.drift import Drift, Shift
from bpo.bootstrap.measure.hardness import Hardness
from bpo.config.measure import MeasureConfig
from bpo.config.negatives import WHOLE_SET_SOURCES

# Nearly all, or nearly none of a source's answers refused.
MAX_REFUSED_SHARE, MIN_REFUSED_SHARE = 0.9, 0.002
# Fractions of fewer pairs are not warned about.
FEW = 50
_NAMED = 4

_SOURCE_OF_TYPE = {kind: source for source, kind in COMPLETION_TYPES.items()}


def text_warnings(
    kind: str, text: TextTest | None, hard: Hardness, drift: Drift, options: MeasureConfig
) -> Iterator[str]:
    """Warnings, each beginning with the type."""
    if text is not None:
        yield from (f"{kind}: {warning}" for warning in _telling(kind, text, options))
    yield from (f"{kind}: {warning}" for warning in _hard(kind, hard, options))
    if drift.shifts:
        yield f"{kind}: {_drifted(drift)}"


def _telling(kind: str, text: TextTest, options: MeasureConfig) -> Iterator[str]:
    accuracy = f"{text.accuracy:.2f} +- {text.standard_error:.2f}"
    if not text.is_beyond_chance:
        return
    if text.accuracy > options.max_accuracy:
        hints = [
            f"{side} has {_names(ngrams)}"
            for side, ngrams in (("rejected", text.rejected_ngrams), ("preferred", text.preferred_ngrams))
            if ngrams
        ]
        if text.length_accuracy > options.max_accuracy:
            side = "shorter" if text.rejected_shorter > text.rejected_longer else "longer"
            hints.append(f"the rejected answer is {side} in {max(text.rejected_shorter, text.rejected_longer):.0%}")
        yield (
            f"the text alone tells which answer is preferred (accuracy {accuracy} on held-out pairs; balanced text: at "
            f"most {options.max_accuracy:g}), so training can raise the margin without looking at the image"
            + (f" ({'; '.join(hints)})" if hints else "")
            + f". {_what_to_do(kind)}"
        )
    elif text.share_above_zero > options.max_share:
        yield (
            f"in {text.share_above_zero:.0%} of the held-out pairs the rejected answer looks better to a text-only "
            "model trained on the other pairs: records contradict each other. Look at the most telling n-grams and at "
            "answers that are preferred in one record and rejected in another"
        )


def _what_to_do(kind: str) -> str:
    own = {
        "inject": "Change the prompts (bootstrap.inject.prompt_dir) or the LLM, ",
        "swap": "Raise bootstrap.swap.rounds and block_size, ",
        "edit": "Choose other bootstrap.edit.kinds, ",
    }.get(_SOURCE_OF_TYPE.get(kind, ""), "")
    advice = "balance by choice or weights (bootstrap.select), or add the sources `swap` and `edit`"
    return f"{own}{advice}" if own else advice[0].upper() + advice[1:]


def _hard(kind: str, hard: Hardness, options: MeasureConfig) -> Iterator[str]:
    share = hard.top_text_share
    if hard.num_texts >= FEW and share > options.max_text_share and share * hard.num_texts >= 5:
        yield (
            f"one text is {share:.0%} of the rejected answers: {_short(hard.top_text)!r}. Refuse it "
            "(bootstrap.validate), or change the prompt or model that produces it"
        )
    if hard.num_diffs >= FEW and hard.false_negatives > options.max_true_share:
        yield (
            f"{hard.false_negatives:.0%} of the rejected answers say nothing that the preferred one does not say, so "
            "they are as true of the image. Refuse them: bootstrap.validate.require_real_change, min_length_ratio "
            f"(such as records {', '.join(hard.false_negative_examples[:3])})"
        )
    truth = hard.truth
    if truth and truth.num_pairs >= FEW and truth.false_negatives > options.max_true_share:
        yield (
            f"{truth.false_negatives:.0%} of the rejected answers name only objects that are in the image, and change "
            "no attribute, count or relation: they may be true. Use stronger weakening, or edits of objects"
        )
    refused = hard.refused_share
    if refused is not None and refused > MAX_REFUSED_SHARE:
        yield (
            f"{refused:.0%} of the source's answers were refused; the rest may be a special selection. Read the reasons"
            " in GROUPS.refused.jsonl"
        )
    is_generated = _SOURCE_OF_TYPE.get(kind) not in WHOLE_SET_SOURCES
    if refused is not None and refused < MIN_REFUSED_SHARE and hard.num_texts >= 4 * FEW and is_generated:
        yield (
            f"nearly no answer of the source was refused ({refused:.1%}); check that bootstrap.validate is not too "
            "permissive: read some in bpo view"
        )


def _drifted(drift: Drift) -> str:
    rest = drift.num_shifted - _NAMED
    return (
        f"the kept annotations are not a fair sample of all ({drift.num_kept} of {drift.num_all} in the sample): "
        + ", ".join(map(_shift, drift.shifts[:_NAMED]))
        + (f" and {rest} more" if rest > 0 else "")
        + ". Refusals or an unfinished job remove some kinds of records: finish the job, look at the reasons of the "
        "refusals, or fill the missing records with `swap`"
    )


def _shift(shift: Shift) -> str:
    return f"{shift.what} {shift.name!r} {shift.share_all:.1%} -> {shift.share_kept:.1%}"


def _names(ngrams: tuple[Telling, ...]) -> str:
    return ", ".join(f"{telling.ngram!r}" for telling in ngrams[:_NAMED])


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
