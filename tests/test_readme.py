"""The README's tree and table match the code, and the tests that documents name exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree_files() -> set[str]:
    block = README.split("## The tree")[1].split("```")[1]
    folder, found = "", set()
    for line in block.splitlines():
        if re.match(r"\S+/$", line):
            folder = line
        elif match := re.match(r"(  )?(\S+\.\w+)\s+\S", line):
            found.add((folder if match.group(1) else "") + match.group(2))
    return found


def test_tree_has_every_module_with_a_comment_and_nothing_else() -> None:
    modules = {str(p.relative_to(ROOT)) for d in ("bpo", "kernels") for p in (ROOT / d).rglob("*.py")}
    modules = {m for m in modules if not m.endswith("__init__.py")}
    listed = tree_files()
    assert modules - listed == set()
    assert {f for f in listed if not (ROOT / f).exists()} == set()


def test_files_and_functions_of_the_table_exist() -> None:
    table = README.split("## Equations, functions, tests")[1].split("##")[0]
    references = re.findall(r"`((?:bpo|kernels|tests)/[\w/.]*)(?:: ([\w.]+))?`", table)
    assert len(references) > 12
    for path, name in references:
        assert (ROOT / path).exists(), path
        if name:
            assert re.search(rf"(def|class) {name.split('.')[-1]}\b", (ROOT / path).read_text()), f"{path}: {name}"


def test_tests_named_in_documents_exist() -> None:
    references = {
        (document.name, path.removeprefix("tests/"), name)
        for document in (ROOT / "docs").glob("*.md")
        for path, name in re.findall(r"`([\w/]*\btest_\w+\.py)(?:::(\w+))?`", document.read_text(encoding="utf-8"))
    }
    assert len(references) >= 100
    missing = [
        (document, f"{path}::{name}")
        for document, path, name in sorted(references)
        if not (ROOT / "tests" / path).exists()
        or (name and f"\ndef {name}(" not in (ROOT / "tests" / path).read_text(encoding="utf-8"))
    ]
    assert missing == []
