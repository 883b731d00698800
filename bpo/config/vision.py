"""Options of a frozen vision tower during training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bpo.config.options import Section, check, number


@dataclass(kw_only=True)
class VisionConfig(Section):
    """Work of a frozen vision tower.

    Attributes:
        encode: When a frozen tower runs: `step` encodes each image of a rank's step once, in as few batches as
            batch_tokens allows, before its first micro-batch, for which all of them are loaded; `micro_batch` encodes
            in each micro-batch; `auto` is `step` with a cache, otherwise `micro_batch`.
        batch_tokens: Maximum number of patches per batch of the tower with `encode: step`.
        cache: Features of the frozen tower that later steps and runs read instead of encoding again: `memory` (of the
            host, by each rank), `disk` or `none`. The projector still runs, and may be trained.
        cache_dir: Directory of `cache: disk`, which ranks and runs share, such as one in /dev/shm; empty uses
            train.output_dir/features.
        cache_gb: Maximum size of the cache per rank (`memory`) or of the directory (`disk`), in GB; images beyond it
            are encoded again.
    """

    where = "vision"

    encode: Literal["auto", "step", "micro_batch"] = "auto"
    batch_tokens: int = number(65536, at_least=1)
    cache: Literal["none", "memory", "disk"] = "none"
    cache_dir: str = ""
    cache_gb: float = number(16.0, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.cache == "none" or self.encode != "micro_batch",
            "vision.cache needs the images of a step: set vision.encode to step or auto",
        )
