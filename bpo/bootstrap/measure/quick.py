"""Text measures of a sample of the records that pass through `bpo check`."""

from __future__ import annotations

import hashlib

from bpo.bootstrap.measure.pairs import Sample
from bpo.bootstrap.measure.report import table
from bpo.bootstrap.measure.text import TextMeasures, all_warnings
from bpo.config.measure import MeasureConfig
from bpo.formats.embedded import name_embedded
from bpo.formats.importers.preferences import PairRow
from bpo.formats.importers.registry import Schema
from bpo.formats.jsonfiles import Piece
from bpo.formats.problems import RecordError
from bpo.formats.reading import adapt
from bpo.records import PreferenceGroup


class QuickMeasures:
    """Draws records by a hash of their content, or of their place in a table, and parses only those."""

    def __init__(self, options: MeasureConfig | None = None):
        self._options = options or MeasureConfig()
        self._sample: Sample[PreferenceGroup] = Sample(self._options.quick_pairs)

    def add(self, schema: Schema, piece: Piece) -> None:
        source = piece.where if isinstance(piece.source, dict) else piece.source
        content = source.encode("utf-8", "surrogatepass") if isinstance(source, str) else source
        rank = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
        if not self._sample.accepts(rank):
            return
        try:
            outcome = adapt(schema, piece, name_embedded)[1]
        except RecordError:
            return  # the check reports it
        group = outcome.group if isinstance(outcome, PairRow) else outcome
        if isinstance(group, PreferenceGroup):
            self._sample.add(rank, piece.where, group)

    def lines(self) -> list[str]:
        """The table of measures and the warnings; empty without a pair."""
        measures = TextMeasures(self._options, quick=True)
        for group in self._sample.values():
            measures.add_alone(group)
        found = measures.measure()
        if not found:
            return []
        head = f"what the texts of {len(self._sample.values()):,} sampled groups give away (all of them: bpo measure):"
        return [head, table(found), *(f"warning: {text}" for text in all_warnings(found.values()))]
