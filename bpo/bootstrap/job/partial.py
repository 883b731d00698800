"""What a partial merge tells about its groups: what is not finished, and how it differs from all annotations."""

from __future__ import annotations

from collections.abc import Iterator

from bpo.bootstrap.job.merge import BootstrapSummary

_SHOWN = 5


def describe(summary: BootstrapSummary) -> Iterator[str]:
    """Lines for the terminal."""
    unfinished = ", ".join(f"{source} {count}" for source, count in summary.unfinished.items())
    yield (
        f"partial: of {summary.num_annotations} annotations, these have no outcome yet: {unfinished}; "
        "a merge of the finished job replaces the files"
    )
    for kind, measures in summary.measures.items():
        drift = measures["drift"]
        shifts = "; ".join(
            f"{shift['what']} {shift['name']!r} in {shift['share_kept']:.1%}, of all in {shift['share_all']:.1%}"
            for shift in drift["shifts"][:_SHOWN]
        )
        if drift["num_tried"]:
            yield (
                f"{kind}: {drift['num_kept']} of {drift['num_all']} sampled annotations; {drift['num_shifted']} of "
                f"{drift['num_tried']} words, objects, attributes and lengths differ from all by more than chance"
                + (f": {shifts}" if shifts else "")
            )
        else:
            yield f"{kind}: {drift['num_kept']} of {drift['num_all']} sampled annotations, too few or all: not compared"
