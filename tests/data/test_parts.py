from __future__ import annotations

from bpo.data.parts import in_part

IDS = [f"record-{number}" for number in range(3000)]


def test_parts_are_disjoint_and_hold_every_record() -> None:
    parts = [{record for record in IDS if in_part(record, f"{number}/3")} for number in (1, 2, 3)]
    assert sum(len(part) for part in parts) == len(IDS) and set().union(*parts) == set(IDS)
    assert all(900 < len(part) < 1100 for part in parts)
    assert all(in_part(record, "") and in_part(record, "1/1") for record in IDS)
