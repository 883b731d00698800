"""Takes the screenshots for docs/data.md from the two pages of its walk-through.

python -m tests.tools.view.take_pictures mine/page mine/scored docs/images
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.browser import Tab, browser_tab

NO_STATISTICS = "document.getElementById('statistics').open = false"


def take(tab: Tab, page: Path, address: str, action: str, out: Path, height: int) -> None:
    tab.open("about:blank")
    tab.open(f"{page.resolve().as_uri()}/index.html{address}", height=height)
    tab.until("document.querySelectorAll('article').length > 0")
    tab.run(f"{action}; new Promise(done => setTimeout(done, 300))")
    tab.until("[...document.images].filter(i => i.getBoundingClientRect().top < innerHeight).every(i => i.complete)")
    tab.screenshot(out)


def main(page: Path, scored: Path, folder: Path) -> None:
    with browser_tab() as tab:
        opened = "document.querySelector('.source').open = true"
        take(tab, page, "", opened, folder / "view-statistics.png", 960)
        take(tab, page, "#search=a+fork&refused=any", NO_STATISTICS, folder / "view-groups.png", 1000)
        take(tab, scored, "#order=margin&ratios=1", NO_STATISTICS, folder / "view-scores.png", 620)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
