"""Restarts without progress."""

from __future__ import annotations

from pathlib import Path

import pytest

from bpo.job.restarts import NoProgressError, RestartCount


def test_restarts_without_a_new_checkpoint_come_to_an_end(tmp_path: Path) -> None:
    count = RestartCount(tmp_path)
    assert [count.start(10, 3) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(NoProgressError, match=r"3 restarts since the checkpoint of step 10.*restarts\.json"):
        count.start(10, 3)
    assert count.start(20, 3) == 1  # a new checkpoint is progress
    count.clear()
    assert [count.start(20, 0) for _ in range(9)] == list(range(1, 10))  # 0: no limit


@pytest.mark.parametrize("content", ["{", "{}", "[]", "3", '{"step": 10, "restarts": null}'])
def test_a_damaged_count_restarts_with_a_warning(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "restarts.json").write_text(content)
    assert RestartCount(tmp_path).start(10, 3) == 1
    assert "damaged" in caplog.text
