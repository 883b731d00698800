"""Fixtures: a groups file, its page, a browser tab."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Tab, browser_tab
from tests.tools.view.sample_page import view, write_data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path)


@pytest.fixture
def page(data: Path) -> Path:
    return view(data, "--scores", str(data.parent / "scores.jsonl"))


@pytest.fixture(scope="session")
def tab() -> Iterator[Tab]:
    with browser_tab() as tab:
        yield tab
