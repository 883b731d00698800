"""Sources of a plug-in: docs/examples/source.py, faulty ones, and their part in the identity of a job."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from bpo.bootstrap.completion_types import COMPLETION_TYPES, PROVENANCE_SOURCES
from bpo.bootstrap.plugin import REGISTERED, load_sources
from bpo.bootstrap.run import run_bootstrap
from bpo.config.bootstrap import BootstrapConfig, ServerConfig, VisionConfig
from bpo.config.training import Config
from bpo.formats.files import read_groups
from bpo.job.plugins import _loaded
from tests.bootstrap.fake_server import completion, fake_server
from tests.conftest import ROOT

EXAMPLE = ROOT / "docs" / "examples" / "source.py"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a test loads and registers is forgotten after it."""
    with ExitStack() as stack:
        for registered in (COMPLETION_TYPES, PROVENANCE_SOURCES, REGISTERED, _loaded):
            stack.enter_context(patch.dict(registered))
        yield


def test_the_example_makes_negatives_of_its_own_type_and_starts_again_when_it_changes(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    plugin = tmp_path / "source.py"
    plugin.write_text(EXAMPLE.read_text())

    def job(url: str, **options: Any) -> Config:
        vision = VisionConfig(engine="server", server=ServerConfig(url=url, model="big"))
        return make("a", sources=["leading"], plugin=str(plugin), vision=vision, limit=3, **options)

    with fake_server(lambda body, number: completion(f"A zebra, number {body['seed']}."), models=["big"]) as (
        url,
        received,
    ):
        summary = run_bootstrap(job(url), progress=False)
        assert summary.kept == {"leading": 3} == {"leading": len(received)}
        for body in received:
            assert body["messages"][0]["content"][-1]["text"].endswith("often seen in such places.")
        negative = read_groups(Path(job(url).data.groups))[0].completions[1]
        assert (negative.type, negative.provenance.source) == ("mllm-leading", "leading-request")
        run_bootstrap(job(url), progress=False)
        assert len(received) == 3
        for registered in (COMPLETION_TYPES, PROVENANCE_SOURCES, REGISTERED):  # as in another process
            registered.pop("leading")
        _loaded.clear()
        then = plugin.stat().st_mtime_ns
        plugin.write_text(EXAMPLE.read_text().replace("often seen", "never seen"))
        os.utime(plugin, ns=(then, then))  # bytecode of the first version would pass for the second
        with pytest.raises(ValueError, match=r"3 outcomes with other options: bootstrap.plugin \(content\) was '"):
            run_bootstrap(job(url), progress=False)
        run_bootstrap(job(url, accept_changes=["leading"]), progress=False)
        assert received[3]["messages"][0]["content"][-1]["text"].endswith("never seen in such places.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("'weaken', completion_type='a', provenance='a'", "a source named 'weaken' is already registered"),
        ("'of mine', completion_type='a', provenance='a'", "a source named 'of mine': use lower-case letters"),
        ("'mine', completion_type='gt', provenance='a'", "type 'gt' are of another source; choose another type"),
        ("'mine', completion_type='swap', provenance='a'", "type 'swap' are of another source; choose another type"),
    ],
)
def test_a_name_or_type_that_is_taken(arguments: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"from bpo.bootstrap.plugin import *\n\nregister_source({arguments})(print)\n")
    with pytest.raises(ValueError, match=f"bootstrap.plugin .*mine.py: line 3: ValueError: .*{message}"):
        load_sources(BootstrapConfig(plugin=str(tmp_path / "mine.py")))


def test_an_unknown_source_is_named_once_the_plug_in_is_loaded() -> None:
    with pytest.raises(ValueError, match="'leading' is none of weaken, inject, "):
        BootstrapConfig(sources=["leading"])
    options = BootstrapConfig(sources=["weaken", "leding"], plugin=str(EXAMPLE))
    with pytest.raises(ValueError, match="'leding' is none of weaken, .*, leading; correct it, or register it in"):
        load_sources(options)
    with pytest.raises(ValueError, match=r"^bootstrap.plugin mine: not a .py file"):
        load_sources(BootstrapConfig(plugin="mine"))
