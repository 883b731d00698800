"""Which chat template is used, and what becomes of one that fails."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from bpo.data import processor as processor_module
from bpo.data.encode import Encoder, EncodingError
from bpo.data.processor import EndlessTemplateError, load_processor, render_template
from tests.sample_groups import encoder_of, turn
from tests.tiny import LLAVA_TEMPLATE

# As many tokenizers of language models have it: content is text.
TEXT_TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{{ messages[0]['role'] }}{% endfor %}{% endfor %}"


@pytest.fixture
def model_dir(tmp_path: Path, tiny_llava_dir: Path) -> Path:
    """A LLaVA whose processor has no template of its own, and whose tokenizer's takes only text."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_llava_dir, directory)
    (directory / "chat_template.jinja").unlink()
    set_key(directory / "tokenizer_config.json", TEXT_TEMPLATE)
    return directory


def set_key(file: Path, template: object) -> None:
    tree = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(tree | {"chat_template": template}))


@pytest.mark.parametrize("name", ["chat_template.json", "chat_template.jinja", "processor_config.json"])
def test_the_processors_own_template_wins_and_the_difference_is_logged(
    model_dir: Path, photo_root: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    if name.endswith(".jinja"):
        (model_dir / name).write_text(LLAVA_TEMPLATE)
    else:
        set_key(model_dir / name, LLAVA_TEMPLATE)
    with caplog.at_level(logging.WARNING):
        encoder = encoder_of(model_dir, photo_root)
    assert encoder.processor.chat_template == LLAVA_TEMPLATE
    (message,) = [r.getMessage() for r in caplog.records if "another chat template" in r.getMessage()]
    assert f"tokenizer_config.json has another chat template than {name}" in message.replace(", the tokenizer", "")
    assert encoder.encode_prompt("r", ["wide.png"], [turn(None, "What?")]).prefix_ids


def test_equal_templates_are_not_reported(tiny_llava_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert load_processor(str(tiny_llava_dir)).chat_template == LLAVA_TEMPLATE
    assert "chat template" not in caplog.text


def test_a_damaged_template_file_is_named(model_dir: Path) -> None:
    (model_dir / "chat_template.json").write_text('{"chat_template": "{% for')
    with pytest.raises(ValueError, match=r"chat_template\.json is not valid JSON"):
        load_processor(str(model_dir))


@pytest.mark.parametrize("name", ["preprocessor_config.json", "config.json"])
def test_a_missing_file_is_one_line(model_dir: Path, name: str) -> None:
    for file in (model_dir / name, model_dir / "processor_config.json"):
        file.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=f"^{model_dir}: no tokenizer or image processor [^\n]*{name}[^\n]*$"):
        load_processor(str(model_dir))


@pytest.mark.parametrize("template", [TEXT_TEMPLATE, TEXT_TEMPLATE.replace("' + m['content']", "' ~ m['content']")])
def test_a_template_that_takes_only_text_is_named(model_dir: Path, photo_root: Path, template: str) -> None:
    set_key(model_dir / "tokenizer_config.json", [{"name": "default", "template": template}])
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: the chat template takes only text as content"):
        encoder_of(model_dir, photo_root)


def test_a_template_that_fails_on_a_record_names_both(tiny_llava_dir: Path, photo_root: Path) -> None:
    processor = load_processor(str(tiny_llava_dir))
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + LLAVA_TEMPLATE
    config = AutoConfig.from_pretrained(tiny_llava_dir)
    encoder = Encoder(replace(processor, chat_template=refusing), config, photo_root, 2048)
    assert encoder.encode_prompt("r", [], [turn("What?")]).prefix_ids
    with pytest.raises(EncodingError, match=r"'r7'.*chat_template\.jinja: .* fails \(TemplateError: no system\)"):
        encoder.encode_prompt("r7", [], [turn("Be brief.", role="system"), turn("What?")])


def test_an_endless_template_is_stopped_and_named(
    model_dir: Path, photo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor_module, "TEMPLATE_TIMEOUT_S", 0.2)
    (model_dir / "chat_template.jinja").write_text(ENDLESS)
    before = set(threading.enumerate())
    stopped = r"the chat template was stopped after 0\.2 s"
    with pytest.raises(EndlessTemplateError, match=rf"model: chat_template\.jinja: {stopped}"):
        encoder_of(model_dir, photo_root)
    tokenizer = load_processor(str(model_dir)).tokenizer
    with pytest.raises(EndlessTemplateError, match=f"a text-only LLM: {stopped}"):
        render_template(tokenizer, None, [{"role": "user", "content": "?"}], "a text-only LLM")
    deadline = time.monotonic() + 60
    while set(threading.enumerate()) - before:  # nothing goes on in the background
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_token_without_an_embedding_row_is_named_at_the_start(
    tmp_path: Path, tiny_llava_dir: Path, photo_root: Path
) -> None:
    shutil.copytree(tiny_llava_dir, tmp_path / "model")
    tokenizer = load_processor(str(tiny_llava_dir)).tokenizer
    rows = len(tokenizer)
    (config := AutoConfig.from_pretrained(tiny_llava_dir)).image_token_id = rows
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=rf"image token has id {rows} .* which the tokenizer lacks"):
        encoder_of(tmp_path / "model", photo_root)
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=rf"'<new>' .* has id {rows}, .* {rows} rows .*embeddings\({rows + 1}\)"):
        encoder_of(tmp_path / "model", photo_root)
