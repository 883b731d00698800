"""Options of the measures of preference groups: `bpo measure`, the end of `bpo bootstrap` and `bpo check`."""

from __future__ import annotations

from dataclasses import dataclass

from bpo.config.options import NUM_SEEDS, Section, check, number


@dataclass(kw_only=True)
class MeasureConfig(Section):
    """Measures of preference groups: whether the text alone tells the answers apart, and whether the sample is biased.

    Samples are drawn by record id and seed, so they depend neither on the order of the records nor on restarts.

    Attributes:
        pairs: Maximum number of preference pairs per completion type for the text-only discriminator.
        quick_pairs: The same at the end of `bpo bootstrap` and `bpo merge`, and in `bpo check`; there, 4 times as many
            annotations are compared, and a quarter as many pairs aligned.
        annotations: Maximum number of annotations whose words are compared with those of the kept ones.
        diffs: Maximum number of pairs per type that are aligned word by word: types of change, false negatives.
        folds: Number of folds of the cross-validation.
        seed: Seed of the samples and folds.
        max_accuracy: Warn if the text-only discriminator is more accurate than this.
        max_share: Warn if the share of rejected answers that are more plausible than the preferred one, judged without
            the image, is above this or below 1 minus this.
        max_text_share: Warn if one text is a larger share of the rejected answers of a type.
        max_true_share: Warn if a larger share of the rejected answers is true of the image.
        out: File to which the groups are written too, balanced by `bootstrap.select.balance`; empty writes none.
        records: Maximum number of records for the measures that need the model (`model.path`).
        blind_images: Number of other records' images under which an answer's blind probability is averaged.
        max_micro_batch_tokens: Maximum number of packed tokens per forward pass of these measures.
        wide_margin: Log-probability, in nats, by which the model must prefer the annotation for a pair to count as
            already rejected by a wide margin.
    """

    where = "measure"

    pairs: int = number(10_000, at_least=10)
    quick_pairs: int = number(2000, at_least=10)
    annotations: int = number(50_000, at_least=10)
    diffs: int = number(2000, at_least=10)
    folds: int = number(5, at_least=2, at_most=100)
    seed: int = number(0, at_least=0, below=NUM_SEEDS)
    max_accuracy: float = number(0.65, above=0.5, at_most=1)
    max_share: float = number(0.65, above=0.5, at_most=1)
    max_text_share: float = number(0.05, above=0, at_most=1)
    max_true_share: float = number(0.1, above=0, at_most=1)
    out: str = ""
    records: int = number(512, at_least=1)
    blind_images: int = number(8, at_least=1, at_most=1024)
    max_micro_batch_tokens: int = number(8192, at_least=1)
    wide_margin: float = number(10.0, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.quick_pairs <= self.pairs,
            f"measure.quick_pairs is {self.quick_pairs}, more than measure.pairs={self.pairs}; lower it",
        )
