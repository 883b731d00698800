"""Fingerprints tell policies apart: models, adapters, and the same adapter on another base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bpo.config.adapter import is_adapter
from bpo.config.training import missing_model
from bpo.model.reference.fingerprint import model_fingerprint
from bpo.model.weights import policy_fingerprint, weights_digest


def model(folder: Path, weights: bytes = b"weights") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return str(folder)


def adapter(folder: Path, base: str, weights: bytes = b"lora") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return str(folder)


def test_digests_of_models_are_those_of_earlier_jobs(tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    assert weights_digest(path) == "968a3ab04a34f1c8b5282a9a97f32ee3cd52e2fbd6b93a7da1ea0b4bb294b817"
    assert policy_fingerprint(path) == "968a3ab04a34f1c8"
    assert weights_digest("org/name") is None and policy_fingerprint("org/name") == "hub:org/name"


def test_every_change_of_an_adapter_or_its_base_changes_the_fingerprints(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    path = adapter(tmp_path / "a", base)

    def both(path: str) -> tuple[str, str]:
        return policy_fingerprint(path), json.dumps(model_fingerprint(path))

    seen = [both(base), both(path)]
    adapter(tmp_path / "a", base, b"more")
    seen.append(both(path))
    model(tmp_path / "base", b"other")
    seen.append(both(path))
    assert all(len({one[k] for one in seen}) == 4 for k in (0, 1))
    assert all(len(name) == 16 for name, _ in seen)
    (tmp_path / "a" / "tokenizer.json").write_text("{}")  # the base's is used
    assert both(path) == seen[-1]
    assert policy_fingerprint(adapter(tmp_path / "h", "org/b")) != policy_fingerprint(adapter(tmp_path / "i", "org/c"))


def test_no_path_is_not_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(adapter(tmp_path / "a", "org/b"))
    assert not is_adapter("") and is_adapter(".")


def test_a_base_that_is_gone_or_an_adapter_itself_is_named(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", str(tmp_path / "gone"))
    assert missing_model(path) == f"the adapter's base {str(tmp_path / 'gone')!r}: no such directory"
    with pytest.raises(ValueError, match=r"b/adapter_config.json: base_model_name_or_path is .*a', an adapter itself"):
        policy_fingerprint(adapter(tmp_path / "b", path))
