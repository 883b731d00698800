"""`bpo score`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.data.encode import load_encoder
from bpo.formats.files import read_groups
from bpo.model.load import load_model
from bpo.tools.score import main, token_texts
from tests.test_train import write_groups


@pytest.fixture
def trained(tiny_llava_dir: Path, tmp_path: Path) -> Path:
    """The tiny model with a different LM head."""
    folder = shutil.copytree(tiny_llava_dir, tmp_path / "trained")
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if "lm_head" in name]
    weights[name] = weights[name] * 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def score(root: Path, policy: Path, reference: Path, *more: str) -> list[dict[str, Any]]:
    out = root / "scores.jsonl"
    sides = ["--policy", str(policy), "--reference", str(reference), "--dtype", "float32"]
    where = ["--image-root", str(root / "images"), "--out", str(out)]
    assert main([str(root / "groups.jsonl"), *sides, *where, *more]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_scores_are_the_log_probs_of_each_model(tiny_llava_dir: Path, trained: Path, tmp_path: Path) -> None:
    write_groups(tmp_path, 3)
    lines = score(tmp_path, trained, tiny_llava_dir, "--max-micro-batch-tokens", "200")
    groups = read_groups(tmp_path / "groups.jsonl")
    assert [line["id"] for line in lines] == [group.id for group in groups]
    config = Config(
        model=ModelConfig(path=str(trained), dtype="float32"), data=DataConfig(image_root=str(tmp_path / "images"))
    )
    encoder, model = load_encoder(config), load_model(config.model)
    for group, line in zip(groups, lines, strict=True):
        for completion, scored in zip(group.completions, line["completions"], strict=True):
            prompt = encoder.encode_prompt(group.id, group.images, group.prompt)
            ids = encoder.encode_completion(completion.response)
            whole = torch.tensor([[*prompt.prefix_ids, *ids]])
            with torch.no_grad():
                logits = model(input_ids=whole, **prompt.image_inputs).logits[0, len(prompt.prefix_ids) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(scored["policy"]), expected, atol=1e-4, rtol=0)
            assert scored["response"] == completion.response
            assert max(abs(a - b) for a, b in zip(scored["policy"], scored["reference"], strict=True)) > 0.01
            assert len(scored["tokens"]) == len(ids) and "".join(scored["tokens"][:-1]) == completion.response


def test_images_and_prompts_are_those_of_the_training(tiny_llava_dir: Path, tmp_path: Path) -> None:
    write_groups(tmp_path, 1)
    Image.new("RGB", (40, 20), (200, 30, 30)).save(next((tmp_path / "images").glob("*.png")))

    def first_value(*options: str) -> float:
        (line,) = score(tmp_path, tiny_llava_dir, tiny_llava_dir, *options)
        return line["completions"][0]["policy"][0]

    values = {first_value(), first_value("--image-aspect", "pad"), first_value("--system-prompt", "Be kind.")}
    assert len(values) == 3


def test_a_model_against_itself_has_no_log_ratio(tiny_llava_dir: Path, tmp_path: Path) -> None:
    write_groups(tmp_path, 4)
    lines = score(tmp_path, tiny_llava_dir, tiny_llava_dir, "--limit", "2")
    assert len(lines) == 2
    assert all(scored["policy"] == scored["reference"] for line in lines for scored in line["completions"])


def test_bad_records_and_images_are_skipped_listed_and_bounded(
    tiny_llava_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_groups(tmp_path, 4)
    (tmp_path / "images" / "1.png").unlink()
    groups = tmp_path / "groups.jsonl"
    groups.write_text("{torn\n" + groups.read_text())
    lines = score(tmp_path, tiny_llava_dir, tiny_llava_dir, "--max-bad-share", "0.25")
    assert [line["id"] for line in lines] == ["g0", "g2", "g3"]
    listed = [json.loads(line) for line in (tmp_path / "scores.jsonl.quarantine.jsonl").read_text().splitlines()]
    assert [(problem["code"], problem["record"]) for problem in listed] == [("not-json", None), ("image-missing", "g1")]
    assert "skipped 2 bad records" in capsys.readouterr().err
    sides = ["--policy", str(tiny_llava_dir), "--reference", str(tiny_llava_dir), "--out", str(tmp_path / "x.jsonl")]
    arguments = [str(groups), *sides, "--image-root", str(tmp_path / "images")]
    assert main([*arguments, "--max-bad-share", "0.22"]) == 1
    assert "1 of 4 records are bad" in capsys.readouterr().err
    assert main(arguments) == 1  # 0.1
    assert "1 of 5 records are bad" in capsys.readouterr().err
    assert main([*arguments, "--on-bad", "error"]) == 1
    assert "line 1" in capsys.readouterr().err
    groups.write_text(groups.read_text().removeprefix("{torn\n"))
    assert main([*arguments, "--on-bad", "error"]) == 1
    assert "'1.png' is missing" in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists()


def test_models_with_different_tokenizers_are_refused(
    tiny_llava_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_groups(tmp_path, 1)
    other = shutil.copytree(tiny_llava_dir, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {
        w: n ^ 1 if n > 7 else n for w, n in tokenizer["model"]["vocab"].items()
    }  # pairs swap
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    where = ["--image-root", str(tmp_path / "images"), "--out", str(tmp_path / "s.jsonl"), "--dtype", "float32"]
    sides = ["--policy", str(other), "--reference", str(tiny_llava_dir)]
    assert main([str(tmp_path / "groups.jsonl"), *sides, *where]) == 1
    assert "tokenize group 'g0' differently" in capsys.readouterr().err


def test_a_character_of_several_tokens_belongs_to_the_last(tiny_llava_dir: Path) -> None:
    encoder = load_encoder(Config(model=ModelConfig(path=str(tiny_llava_dir))))
    ids = encoder.encode_completion("日本 é!")
    texts = token_texts(encoder, ids)
    assert len(texts) == len(ids)
    assert "".join(texts[:-1]) == "日本 é!"
