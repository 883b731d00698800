"""Names of each source of completions in the groups file: `Completion.type` and `Provenance.source`.

A plug-in's sources are added by `bpo.bootstrap.plugin.register_source`.
"""

from __future__ import annotations

COMPLETION_TYPES = {
    "weaken": "mllm-hal",
    "inject": "llm-hal",
    "crop": "mllm-crop",
    "mask": "mllm-mask",
    "regenerate": "mllm-cont",
    "text-only": "mllm-blind",
    "unweakened": "mllm-self",
    "sample": "mllm-sample",
    "greedy": "mllm-greedy",
    "segment": "mllm-segment",
    "swap": "swap",
    "edit": "edit",
}
PROVENANCE_SOURCES = {
    "annotation": "annotation",
    "weaken": "weakened-image",
    "inject": "injected-errors",
    "crop": "cropped-image",
    "mask": "masked-image",
    "regenerate": "regenerated-end",
    "text-only": "no-image",
    "unweakened": "unweakened-image",
    "sample": "sampled-answer",
    "greedy": "greedy-answer",
    "segment": "regenerated-segment",
    "swap": "other-annotation",
    "edit": "balanced-edit",
}


def candidate_key(source: str, candidate: int) -> str:
    """Name of a source's candidate in the journal: `weaken`, `weaken#1`, `weaken#2` ..."""
    return f"{source}#{candidate}" if candidate else source


def candidate_keys(source: str, num_candidates: int) -> list[str]:
    return [candidate_key(source, candidate) for candidate in range(num_candidates)]


def source_of(key: str) -> str:
    """The source of a `candidate_key`."""
    return key.partition("#")[0]
