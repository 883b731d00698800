"""Options of `bpo export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bpo.config.options import Section


@dataclass(kw_only=True)
class ExportConfig(Section):
    """Options of `bpo export`.

    Attributes:
        checkpoint: Checkpoint directory, or a run's output_dir for its latest checkpoint.
        output: Output directory.
        form: `merged` writes full weights and the processor; `adapter` only the trained weights, as a PEFT adapter.
    """

    where = "export"

    checkpoint: str = ""
    output: str = ""
    form: Literal["merged", "adapter"] = "merged"
