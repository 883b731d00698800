"""Seeds derived from names."""

from __future__ import annotations

from bpo.job.seeds import derive_seed


def test_seeds_differ_by_every_name_and_fit_in_a_json_number() -> None:
    seeds = {derive_seed(s, *names) for s in (0, 1) for names in [("a",), ("b",), ("a", "b"), ("a", 0), ("ab",)]}
    assert len(seeds) == 10
    assert all(0 <= seed < 2**53 for seed in seeds)
    assert derive_seed(0, "record-7", "weaken") == derive_seed(0, "record-7", "weaken")


def test_the_seed_of_given_names_never_changes() -> None:
    """Negatives, orders and stored references of earlier runs depend on it."""
    assert derive_seed(7, "record-7", "noise") == 1228749393177564
