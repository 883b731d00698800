"""Embeddings of prompts before the first step: their values, and what a restart and other ranks do.

Shape letters: D size of an embedding.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from bpo.config.training import Config
from bpo.data import encode
from bpo.job.exits import Interrupted
from bpo.job.launch import Ranks
from bpo.job.signals import StopRequest
from bpo.model.load import load_model, resolve_model
from bpo.model.policy import PolicyModel
from bpo.model.reference.format import ReferenceStoreError
from bpo.training import embeddings as module
from bpo.training.embeddings import PromptEmbeddings, embeddings_directory, fill_embedding_store
from bpo.training.measure import TrainingData, measure_groups
from tests.sentence_encoder import tiny_sentence_encoder
from tests.test_train import launch
from tests.training.doubles import NUM_GROUPS
from tests.training.embedding_job import KINDS, config_of

PATCHES, LAYER = 4, -2  # of the tiny LLaVA's image


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "from_rank_0", lambda make: make())
    monkeypatch.setattr(module, "gather_from_ranks", lambda item: [item])
    monkeypatch.setattr(module, "barrier", lambda: None)


@pytest.fixture(scope="module")
def sentence_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sentence_encoder(tmp_path_factory.mktemp("sentences") / "bert")


class Engine:
    """One process without DeepSpeed; `computed` counts the tower's images."""

    device, dtype, ranks = torch.device("cpu"), torch.float32, Ranks(0, 1, 0)

    def __init__(self, run: Config):
        self.policy = PolicyModel(load_model(run.model, for_training=True))
        self.on_forward = lambda: None
        self.sum_over_ranks = lambda values: values
        self.computed = 0
        self.policy.model.model.vision_tower.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, tower: Any, arguments: Any, named: Any, output: Any) -> None:
        assert not self.policy.training and not torch.is_grad_enabled()
        self.computed += len(named["pixel_values"])


def measured(run: Config) -> TrainingData:
    return measure_groups(run, encode.load_encoder(run), Ranks(), lambda mine: [mine])


def fill(run: Config, engine: Any = None, **options: Any) -> tuple[PromptEmbeddings, dict[str, str]]:
    """The embeddings, and the key of each group."""
    data = measured(run)
    resolved = resolve_model(run.model, for_training=True)
    found = fill_embedding_store(run, resolved, engine or Engine(run), data, **options)
    return found, keys_of(data)


def keys_of(data: TrainingData) -> dict[str, str]:
    return {data.dataset.groups[i].id: m.reference_key for i, m in zip(data.usable, data.measured, strict=True)}


def write_records(run: Config, *records: tuple[str, list[str], str]) -> None:
    """Groups (id, images, prompt), whose answers differ."""
    with Path(run.data.groups).open("w") as file:
        for name, images, prompt in records:
            completions = [{"response": f"{k} {name}", "score": int(k == "yes"), "type": "gt"} for k in ("yes", "no")]
            record = {"id": name, "images": images, "prompt": prompt, "completions": completions}
            file.write(json.dumps(record) + "\n")


RECORDS = (
    ("same", ["wide.png"], "What?"),
    ("again", ["wide.png"], "What?"),
    ("image", ["square.png"], "What?"),
    ("text", ["wide.png"], "Is it red?"),
    ("two", ["wide.png", "square.png"], "<image> or <image>?"),
    ("none", [], "What?"),
)


@torch.no_grad()
def written_out(run: Config, name: str, sentence_dir: Path | None = None) -> torch.Tensor:
    """A group's embedding from the parts of the model, one image at a time."""
    data = measured(run)
    index = next(i for i, group in enumerate(data.dataset.groups) if group.id == name)
    prompt = data.dataset.encode(index).prompt  # type: ignore[union-attr]
    model = load_model(run.model)
    if sentence_dir is None:
        ids = [i for i in prompt.prefix_ids if i != model.config.image_token_id]
        text_D = model.get_input_embeddings().weight[torch.tensor(ids)].mean(0)
    else:
        inputs = AutoTokenizer.from_pretrained(sentence_dir)(
            next(p for n, _, p in RECORDS if n == name).replace("<image>", "")
        )
        tokens = torch.tensor([inputs["input_ids"]])
        text_D = AutoModel.from_pretrained(sentence_dir).eval()(tokens).last_hidden_state[0].mean(0)
    image_D = torch.zeros(16)
    if prompt.image_inputs:
        pictures = prompt.image_inputs["pixel_values"]
        hidden = [model.model.vision_tower(x[None], output_hidden_states=True).hidden_states[LAYER] for x in pictures]
        assert hidden[0].shape[1] == 1 + PATCHES
        image_D = torch.cat([of_image[0, 1:] for of_image in hidden]).mean(0)
        image_D = image_D / image_D.norm()
    joined_D = torch.cat([text_D / text_D.norm(), image_D])
    return joined_D / joined_D.norm()


@pytest.mark.parametrize("kind", ["model", "sentences"])
def test_an_embedding_is_of_the_text_and_the_images(kind: str, run: Config, sentence_dir: Path) -> None:
    run.data.text_only = "keep"
    write_records(run, *RECORDS)
    if kind == "sentences":
        run.loss.prompt_embedding = str(sentence_dir)
    embeddings, keys = fill(run)
    for name, key in keys.items():
        vector_D = embeddings.store.get(key)
        assert vector_D.dtype == torch.float32 and vector_D.norm().item() == pytest.approx(1, abs=1e-6)
        expected_D = written_out(run, name, sentence_dir if kind == "sentences" else None)
        torch.testing.assert_close(vector_D, expected_D, atol=2e-6, rtol=0)


def test_similarity(run: Config) -> None:
    """The same prompt about the same image is 1; another image, another text and none are less."""
    run.data.text_only = "keep"
    write_records(run, *RECORDS)
    embeddings, keys = fill(run)
    assert len(set(keys.values())) == len(RECORDS)  # of other answers
    cosines = embeddings.similarity([keys[name] for name, _, _ in RECORDS])
    assert cosines.dtype == torch.float64
    assert cosines[0, 1].item() == pytest.approx(1, abs=1e-6)
    assert (cosines[0, 2:] < 0.999).all()
    assert cosines[0, 5].item() == pytest.approx(0.5**0.5, abs=0.02)  # almost the same text, and one half missing
    pair = embeddings.similarity([keys["same"], keys["image"], keys["same"]])
    assert pair[0, 2] == 1 and torch.equal(pair[0], pair[2]) and torch.equal(pair.diagonal(), torch.ones(3).double())
    of_images = written_out(run, "same")[32:] @ written_out(run, "image")[32:]
    assert pair[0, 1].item() == pytest.approx(0.5 + float(of_images), abs=1e-5)  # equal texts
    assert embeddings.similarity([]).shape == (0, 0)


def test_the_division_into_batches_changes_nothing(run: Config) -> None:
    run.data.text_only = "keep"
    write_records(run, *RECORDS)
    together, keys = fill(run)
    run.train.output_dir, run.train.reference_micro_batch_tokens = f"{run.train.output_dir}-2", 1
    alone, _ = fill(run)
    for key in keys.values():
        torch.testing.assert_close(together.store.get(key), alone.store.get(key), atol=1e-6, rtol=0)


def test_a_restart_computes_only_what_is_missing(run: Config) -> None:
    first = Engine(run)
    embeddings, keys = fill(run, first)
    assert first.computed == len(embeddings.store) == NUM_GROUPS and first.policy.training
    again = Engine(run)
    read, _ = fill(run, again)
    assert again.computed == 0
    assert torch.equal(read.similarity(list(keys.values())), embeddings.similarity(list(keys.values())))
    groups = Path(run.data.groups)
    groups.write_text(groups.read_text().replace("yes 7", "certainly 7"))
    changed = Engine(run)
    fill(run, changed)
    assert changed.computed == 1


def test_the_sentence_encoder_is_not_read_if_nothing_is_missing(
    run: Config, sentence_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.loss.prompt_embedding = str(sentence_dir)
    embeddings, keys = fill(run)
    monkeypatch.setattr(module, "SentenceEncoder", None)
    read, _ = fill(run)
    assert torch.equal(read.similarity(list(keys.values())), embeddings.similarity(list(keys.values())))


def test_embeddings_of_another_kind_or_encoder_are_refused(run: Config, sentence_dir: Path, tmp_path: Path) -> None:
    fill(run)
    run.loss.prompt_embedding = str(sentence_dir)
    with pytest.raises(ReferenceStoreError, match="prompt_embedding: model in the store, sentence encoder in this run"):
        fill(run)
    shutil.rmtree(embeddings_directory(run))
    fill(run)
    other = Path(shutil.copytree(sentence_dir, tmp_path / "encoder"))
    run.loss.prompt_embedding = str(other)
    fill(run)  # its content counts, not its place
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with pytest.raises(ReferenceStoreError, match="encoder:config.json"):
        fill(run)


def test_embeddings_are_beside_the_reference(run: Config, tmp_path: Path) -> None:
    assert embeddings_directory(run) == Path(run.train.output_dir) / "reference-embeddings"
    run.train.reference_dir = str(tmp_path / "shared")
    assert embeddings_directory(run) == tmp_path / "shared-embeddings"


def test_a_signal_ends_the_pass_after_its_batch(run: Config) -> None:
    """Another rank received it: this one stops through the sum over ranks."""
    run.train.reference_micro_batch_tokens = 1
    engine = Engine(run)
    others = iter([0.0, 0.0, 1.0])
    engine.sum_over_ranks = lambda values: [values[0] + next(others)]
    with StopRequest() as stop, pytest.raises(Interrupted, match="while embedding prompts; 9 of 12 groups remain"):
        fill(run, engine, stop=stop)
    again = Engine(run)
    embeddings, _ = fill(run, again)
    assert (engine.computed, again.computed, len(embeddings.store)) == (3, 9, NUM_GROUPS)


def test_a_group_whose_image_is_gone_is_left_out(run: Config, tmp_path: Path) -> None:
    """A batch that loses all its groups still runs the tower, as the other ranks wait for it."""
    images = Path(shutil.copytree(run.data.image_root, tmp_path / "images"))
    run.data.image_root, run.data.on_bad, run.data.max_bad_share = str(images), "quarantine", 1.0
    run.train.reference_micro_batch_tokens = 1
    data = measured(run)
    (images / "tall.png").unlink()
    engine: Any = Engine(run)
    embeddings = fill_embedding_store(run, resolve_model(run.model, for_training=True), engine, data)
    assert data.lost.indices == {1, 4, 7, 10}
    assert len(embeddings.store) == 8 and engine.computed == NUM_GROUPS
    with pytest.raises(KeyError):
        embeddings.similarity([data.measured[1].reference_key])


def test_two_ranks_of_zero_3_compute_what_one_does(
    tmp_path: Path, tiny_llava_dir: Path, sentence_dir: Path, photo_root: Path
) -> None:
    """Weights are in parts on both ranks. Three of seven prompts have no image, one prompt per batch: at times only one
    of the two ranks has an image, and one has an empty batch. A reference pass came before, and a step comes after."""
    for name, source in {"llava": tiny_llava_dir, "bert": sentence_dir, "images": photo_root}.items():
        (tmp_path / name).symlink_to(source)
    more = [("e", [], "Which?"), ("f", [], "What color is the cat?")]
    write_records(
        SimpleNamespace(data=SimpleNamespace(groups=tmp_path / "groups.jsonl")),  # type: ignore[arg-type]
        *[record for record in RECORDS if record[0] != "again"],
        *more,
    )
    result = launch([sys.executable, "-m", "tests.training.embedding_job", str(tmp_path)], timeout_s=240)
    assert result.returncode == 0, result.stdout[-6000:]
    found = torch.load(tmp_path / "vectors.pt")
    for kind in KINDS:
        config = config_of(tmp_path, kind)
        config.train.output_dir = str(tmp_path / f"alone-{kind}")
        embeddings, keys = fill(config)
        assert 0 < found[kind].pop("loss") < 2
        assert found[kind].keys() == keys.keys() and len(keys) == 7
        for name, key in keys.items():
            torch.testing.assert_close(found[kind][name], embeddings.store.get(key), atol=1e-6, rtol=0)
    cosine = F.cosine_similarity(found["model"]["same"], found["model"]["none"], dim=0)
    assert cosine.item() == pytest.approx(0.5**0.5, abs=0.02)
