"""Records the commit of a packed checkout, for a machine without git.

python benchmarks/offline/stamp.py write    writes commit and source digest to .wheels/COMMIT; needs git
python benchmarks/offline/stamp.py read     prints the commit, with "+changes" if the source digest differs
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "checkout"))

from bpo_kernels.provenance import UNKNOWN, source_commit  # noqa: E402

FOLDERS = ("bpo", "kernels", "ds_configs", "benchmarks", "tests")


def digest(root: Path = ROOT) -> str:
    """Digest of names and contents of the sources, excluding results and caches."""
    total = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".yaml", ".json", ".sh", ".txt") and "results" not in path.parts:
                total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def write(folder: Path, root: Path = ROOT) -> None:
    (folder / "COMMIT").write_text(f"{source_commit(*FOLDERS, root=root)} {digest(root)}\n", encoding="utf-8")


def read(folder: Path, root: Path = ROOT) -> str:
    """The commit recorded by `write`, with "+changes" if the sources have changed; "unknown" without a stamp."""
    stamp = folder / "COMMIT"
    if not stamp.exists():
        return UNKNOWN
    commit, packed = stamp.read_text(encoding="utf-8").split()
    unchanged = packed == digest(root) or commit.endswith("+changes") or commit == UNKNOWN
    return commit if unchanged else f"{commit}+changes"


if __name__ == "__main__":
    wheels = ROOT / ".wheels"
    if sys.argv[1:] == ["write"]:
        wheels.mkdir(exist_ok=True)
        write(wheels)
    elif sys.argv[1:] == ["read"]:
        print(read(wheels))
    else:
        sys.exit(f"usage: {sys.argv[0]} write|read")
