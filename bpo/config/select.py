"""Options of the choice among candidates: how many each source makes, and which of them balance the set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bpo.config.options import Section, check, number


@dataclass(kw_only=True)
class SelectConfig(Section):
    """Choice among candidates at the merge, so that the text alone does not tell preferred from rejected answers.

    It applies to the sources that answer record by record; `swap` and `edit` are balanced by construction. Everything
    generated is kept in the job's folder, so these options may change before each merge.

    Attributes:
        candidates: Number of answers that each source generates per record, each with its own seed. Raising it later
            keeps those that exist.
        balance: `none` takes the first usable candidate; `selection` the one, per record and source, with which
            preferred and rejected answers contain each word and pair of words about equally often; `weights` keeps all
            candidates and weights their pairs to the same end.
        max_dropped_share: With `selection`, largest fraction of a source's records that may be left without its
            negative for a better balance.
        min_effective_share: With `weights`, smallest effective sample size (sum w)^2 / sum w^2, as a fraction of the
            pairs.
        block_records: Number of records that are decided together; memory is proportional to it.
    """

    where = "bootstrap.select"

    candidates: int = number(1, at_least=1, at_most=64)
    balance: Literal["none", "selection", "weights"] = "none"
    max_dropped_share: float = number(0.0, at_least=0, below=1)
    min_effective_share: float = number(0.5, above=0, at_most=1)
    block_records: int = number(20_000, at_least=100, at_most=1_000_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.balance != "selection" or self.candidates > 1 or self.max_dropped_share > 0,
            "bootstrap.select.balance=selection has nothing to choose from; set bootstrap.select.candidates above 1, "
            "or bootstrap.select.max_dropped_share above 0",
        )
