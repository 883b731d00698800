"""Edits by blind probability: plausible and exactly balanced, scored under other records' images, resumable."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bpo.bootstrap.job.identity import check_identity
from bpo.bootstrap.job.outcomes import Outcome
from bpo.bootstrap.run import run_bootstrap, run_merge
from bpo.bootstrap.whole_set.blind import BlindScores
from bpo.bootstrap.whole_set.outcomes import plan_whole_set
from bpo.bootstrap.whole_set.permute import exchange
from bpo.bootstrap.whole_set.slots import SlotFinder, put
from bpo.config.bootstrap import BootstrapConfig, ServerConfig, VisionConfig
from bpo.config.negatives import EditConfig
from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.data.encode import EncodedGroup, load_encoder
from bpo.job.exits import Interrupted
from bpo.job.signals import StopRequest
from bpo.model.group_scores import GroupScorer
from bpo.model.load import resolve_model
from bpo.records import Annotation
from tests.bootstrap.jobs import num_lines, num_outcomes, results, stop_after
from tests.bootstrap.whole_set.corpora import caption, captions, config_of, kept

NUM = 13


def words(texts: list[str]) -> Counter[str]:
    return Counter(word for text in texts for word in re.findall(r"\w+", text.casefold()))


@pytest.fixture
def scene(tmp_path: Path, tiny_llava_dir: Path) -> Config:
    """A job over captions of images of noise."""
    rng, draw, records = np.random.default_rng(0), random.Random(0), []
    for number in range(NUM):
        Image.fromarray(rng.integers(0, 255, (28, 28, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nDescribe the image."}]
        turns.append({"from": "gpt", "value": caption(draw)})
        records.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns})
    (tmp_path / "annotations.json").write_text(json.dumps(records))
    return Config(
        model=ModelConfig(path=str(tiny_llava_dir), dtype="float32"),
        data=DataConfig(
            annotations=str(tmp_path / "annotations.json"),
            groups=str(tmp_path / "groups.jsonl"),
            image_root=str(tmp_path),
        ),
        bootstrap=BootstrapConfig(
            sources=["edit"], edit=EditConfig(by="blind", kinds=["attribute"], blind_images=2), batch_size=2
        ),
    )


def elsewhere(config: Config, folder: str) -> Config:
    """The same job with its results in another folder."""
    groups = Path(config.data.groups).parent / folder / "groups.jsonl"
    return replace(config, data=replace(config.data, groups=str(groups)))


def test_plausible_words_are_put_in_and_the_set_stays_balanced() -> None:
    annotations = captions(300)
    found = {}
    for by in ("lexicon", "blind"):
        config = config_of(sources=["edit"], edit=EditConfig(by=by, kinds=["attribute"], blind_words=9))
        finder = SlotFinder(config)
        scores = {a.id: {c: random.Random(a.id + c).gauss(-3, 2) for c in COLOURS} for a in annotations}

        def others(annotation: Annotation, scores: Any = scores) -> list[Outcome]:
            return [Outcome(annotation.id, "edit", "scored", scores=scores[annotation.id])]

        plan = plan_whole_set(config, annotations, others).plans["edit"]
        pairs = kept(annotations, [plan.outcome(number, a) for number, a in enumerate(annotations)])
        assert len(pairs) >= 0.8 * len(annotations)
        assert words([a.response for a, _ in pairs]) == words([o.text for _, o in pairs])
        slots = [(a, o, finder.choose(a)) for a, o in pairs]
        put_in = [
            value
            for a, o, slot in slots
            for word, value in scores[a.id].items()
            if slot and slot[1].form.endswith("bare") and put(a.response, slot[1], word) == o.text
        ]
        assert len(put_in) > 100
        found[by] = sum(put_in) / len(put_in)
    assert found["blind"] > found["lexicon"] + 1.5


COLOURS = "red yellow green blue purple brown black white grey".split()


def test_unfinished_records_take_no_part() -> None:
    annotations = captions(40)
    config = config_of(sources=["edit"], edit=EditConfig(by="blind"))

    def others(annotation: Annotation) -> list[Outcome]:
        return [Outcome(annotation.id, "edit", "scored", scores={})] if int(annotation.id[1:]) < 30 else []

    whole_set = plan_whole_set(config, annotations, others)
    outcomes = [whole_set.of(number, annotation) for number, annotation in enumerate(annotations)]
    assert all(outcomes[:30]) and not any(outcomes[30:])


class Liking:
    """In place of a model: the first token of a completion has log-probability -1 if it is liked, else -4."""

    def __init__(self, encoder: Any, liked: str):
        self.encoder, self.liked = encoder, liked
        self.seen: list[tuple[int, EncodedGroup]] = []

    def score(self, groups: Any, max_tokens: int) -> Iterator[Any]:
        for item, group in groups:
            self.seen.append((item, group))
            starts = [self.encoder.decode(ids).startswith(self.liked) for ids in group.completion_ids]
            yield item, group, [torch.tensor([-1.0 if liked else -4.0]) for liked in starts]


def test_words_are_compared_under_other_images_up_to_the_end_of_their_sentence(scene: Config) -> None:
    scene.bootstrap.edit.blind_images = NUM - 1
    encoder = load_encoder(scene)
    colours = ["red", "blue", "green", "white"]
    texts = [f"Here. The {colours[n % 4]} car stands. A dog runs." for n in range(NUM)]
    annotations = [replace(a, response=text) for a, text in zip(captions(NUM), texts, strict=True)]
    scorer = Liking(encoder, "blue")
    source = BlindScores(scene, annotations, scorer)  # type: ignore[arg-type]
    outcomes = list(source.outcomes(annotations[:2], [source.prepare(a) for a in annotations[:2]]))
    assert outcomes[0].scores == {"blue": 3.0, "green": 0.0, "white": 0.0}  # the annotation says red
    assert outcomes[1].scores == {"red": -3.0, "green": -3.0, "white": -3.0}
    assert Counter(item for item, _ in scorer.seen) == {0: NUM - 1, 1: NUM - 1}
    for item, group in scorer.seen:
        decoded = [encoder.decode(ids) for ids in group.completion_ids]
        assert sorted(decoded) == [f"{colour} car stands." for colour in sorted(colours)]
        assert encoder.decode(group.prompt.prefix_ids).endswith("ASSISTANT: Here. The")
        own = encoder.encode_images(annotations[item].images).inputs["pixel_values"]
        shown = group.prompt.image_inputs["pixel_values"]
        assert shown.shape == own.shape and not torch.equal(shown, own) and float(shown.std()) > 0.1
    assert len({group.prompt.image_inputs["pixel_values"].numpy().tobytes() for _, group in scorer.seen}) == NUM


def test_the_scores_are_the_models_log_probabilities(scene: Config) -> None:
    """Under one image, those of whole answers: what precedes the word is equally probable in all."""
    scene.bootstrap.edit.blind_images = 1
    scorer = GroupScorer(resolve_model(scene.model, for_training=True), load_encoder(scene))
    annotations = captions(NUM)
    source = BlindScores(scene, annotations, scorer)
    prepared = source.prepare(annotations[0])
    (outcome,) = source.outcomes(annotations[:1], [prepared])
    _, slot = SlotFinder(scene).choose(annotations[0]) or (0, None)
    assert slot and outcome.scores and len(outcome.scores) > 2
    texts = [annotations[0].response, *(put(annotations[0].response, slot, word) for word in outcome.scores)]
    encoder = scorer.encoder
    prompt = encoder.encode_prompt("r0", prepared[0], annotations[0].prompt)  # type: ignore[arg-type]
    ids = tuple(encoder.encode_completion(text)[:-1] for text in texts)
    ((_, _, logp),) = scorer.score([(0, EncodedGroup(prompt, ids, (0.0,) * len(ids)))], 10_000)
    own, *others = (float(values_N.double().sum()) for values_N in logp)
    assert list(outcome.scores.values()) == pytest.approx([value - own for value in others], abs=2e-3)


def test_a_job_is_balanced_and_the_same_after_a_stop_and_on_several_ranks(
    scene: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = run_bootstrap(whole := elsewhere(scene, "whole"), progress=False)
    assert summary.kept["edit"] >= NUM - 3 and summary.num_quarantined == 0
    groups = [json.loads(line) for line in results(whole)["groups.jsonl"].splitlines()]
    preferred, rejected = ([g["completions"][n] for g in groups] for n in (0, 1))
    assert words([c["response"] for c in preferred]) == words([c["response"] for c in rejected])
    provenance = rejected[0]["provenance"]
    assert provenance["mode"] == "blind-attribute" and provenance["model"] == scene.model.path
    stopped = elsewhere(scene, "stopped")
    with monkeypatch.context() as patch, StopRequest() as stop, pytest.raises(Interrupted, match="source `edit`"):
        stop_after(patch, 2, stop)
        run_bootstrap(stopped, progress=False, stop=stop)
    left = NUM - num_outcomes(stopped)
    assert 0 < left < NUM
    with pytest.raises(ValueError, match=f"{left} of {NUM} outcomes are missing"):
        run_merge(stopped)
    assert run_merge(stopped, partial=True).unfinished == {"edit": left}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run_bootstrap(stopped, progress=False).num_groups is None
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    run_bootstrap(stopped, progress=False)
    assert num_lines(stopped) == [NUM - left, left] and results(stopped) == results(whole)


def test_an_unreadable_image_is_quarantined_and_takes_no_part(scene: Config) -> None:
    (Path(str(scene.data.image_root)) / "3.png").write_bytes(b"no image")
    scene.data.max_bad_share = 0.5
    summary = run_bootstrap(scene, progress=False)
    assert summary.num_quarantined == 1 and '"r3"' in results(scene)["groups.jsonl.quarantine.jsonl"]
    assert '"r3"' not in results(scene)["groups.jsonl"] and summary.kept["edit"] >= NUM - 4


def test_its_own_options_and_no_others_change_the_scores(scene: Config, tmp_path: Path) -> None:
    def mark(**changes: Any) -> str:
        bootstrap = replace(scene.bootstrap, accept_changes=["edit"], **changes)
        return check_identity(replace(scene, bootstrap=bootstrap), tmp_path / "job").current["edit"]

    before, edit = mark(), scene.bootstrap.edit
    assert mark(edit=replace(edit, blind_images=3)) != before
    assert mark(edit=replace(edit, kinds=["object"])) != before
    assert mark(limit=5) != before
    assert mark(edit=replace(edit, only_missing=True), sources=["weaken", "edit"], batch_size=7) == before
    assert mark(validate=replace(scene.bootstrap.validate, min_changed_words=2)) == before


def test_engines_without_probabilities_are_refused() -> None:
    server = VisionConfig(engine="server", server=ServerConfig(url="http://localhost:1/v1", model="m"))
    for vision in (server, VisionConfig(engine="vllm")):
        BootstrapConfig(sources=["edit"], vision=vision)
        with pytest.raises(ValueError, match="edit.by is blind, which needs bootstrap.vision.engine transformers"):
            BootstrapConfig(sources=["edit"], edit=EditConfig(by="blind"), vision=vision)


def test_an_exchange_ends_whatever_the_fractions_of_its_costs() -> None:
    """Of these costs, whose every exchange gains nothing, sums in float32 differ by rounding."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        cost = (rng.random((64, 1)) * 300 + rng.random(64) * 300).astype(np.float32)
        assert sorted(exchange(cost)) == list(range(64))
