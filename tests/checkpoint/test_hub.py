"""An export is uploaded by huggingface_hub to a local server that keeps what it gets."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpo.checkpoint.export import run_export
from bpo.checkpoint.hub import push
from bpo.config.io import load_config
from bpo.config.training import Config, ModelConfig
from tests.hub_stand_in import StandIn, stand_in
from tests.trained_checkpoint import LORA, perturbed, write_checkpoint

TOKEN = "hf_" + "x" * 34


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    import huggingface_hub

    with stand_in() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # of the other tests; read at import
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def uploaded(server: StandIn, repository: str) -> dict[str, bytes]:
    return {path: content for (name, path), content in server.files.items() if name == repository}


def test_the_finished_directory_is_pushed_as_it_is(
    hub: StandIn, tiny_llava_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also by the same command again, which exports nothing."""
    config = Config(model=ModelConfig(path=str(tiny_llava_dir), dtype="float32"), lora=LORA)
    write_checkpoint(tmp_path / "run", perturbed(config, 0.1), config)
    flags = ["--model.path", str(tiny_llava_dir), "--export.checkpoint", str(tmp_path / "run"), "--push", "me/model"]
    command = load_config([*flags, "--export.output", str(tmp_path / "out")])
    hub.refuse = True
    with pytest.raises(
        ValueError, match=r"out is complete, but.*no write access.*hf upload me/model .*out \. --private"
    ):
        run_export(command)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    hub.refuse = False
    with caplog.at_level(logging.INFO):
        run_export(command)
    assert "already is the export of step 3" in caplog.text
    assert uploaded(hub, "me/model") == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert hub.repositories == {"me/model": True}
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in caplog.text and not any(TOKEN.encode() in content for content in hub.files.values())


def test_a_public_repository_and_one_that_exists(hub: StandIn, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# first\n")
    assert push(tmp_path, "me/open", private=False, message="m") == f"{hub.url}/me/open"
    (tmp_path / "README.md").write_text("# second\n")
    push(tmp_path, "me/open", private=True, message="m")
    assert hub.repositories == {"me/open": False}
    assert uploaded(hub, "me/open") == {"README.md": b"# second\n"}


def test_without_a_server_the_error_says_how_to_repeat(hub: StandIn, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# a\n")
    hub.server_close()
    with pytest.raises(ValueError, match=r"its upload to me/model failed: .*or run: hf upload me/model"):
        push(tmp_path, "me/model", private=True, message="m")


@pytest.mark.parametrize("name", ["model", "a/b/c", "https://huggingface.co/a/b"])
def test_a_name_without_owner_is_refused_at_once(name: str) -> None:
    with pytest.raises(ValueError, match="export.push is .*OWNER/NAME"):
        load_config(["--push", name])
