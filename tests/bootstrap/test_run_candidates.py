"""Jobs of the sources for judges, sample and greedy, of segments, and of parts of the annotations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bpo.bootstrap import sources as sources_module
from bpo.bootstrap.engines import vision as vision_module
from bpo.bootstrap.engines.vision import ChatVisionGenerator, TransformersVisionGenerator
from bpo.bootstrap.run import run_bootstrap
from bpo.bootstrap.segments import Segment, cut_segment
from bpo.bootstrap.sources import ImageAnswers
from bpo.bootstrap.validate import refusal
from bpo.config.bootstrap import SampleConfig, SegmentConfig, ServerConfig, VisionConfig, WeakenConfig
from bpo.config.training import Config
from bpo.data.encode import Encoder, load_encoder
from bpo.formats.files import read_annotations, read_groups
from bpo.job.chat_server import ChatServer, Reply
from bpo.job.seeds import derive_seed
from bpo.records import Annotation
from tests.bootstrap.fake_server import completion, fake_server
from tests.bootstrap.jobs import parts, results

MakeConfig = Callable[..., Config]
SEGMENT = SegmentConfig(max_tokens=6)


def outcomes(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(parts(config).glob("rank-*.jsonl")) for line in path.open()]


def test_each_source_samples_in_its_own_way_and_more_samples_later_keep_the_earlier_ones(make: MakeConfig) -> None:
    sources = ["greedy", "unweakened", "sample"]
    sample = SampleConfig(count=2, temperature=0.9, max_new_tokens=8)
    greedy = WeakenConfig(temperature=0, max_new_tokens=8)  # of unweakened
    config = make("a", sources=sources, sample=sample, weaken=greedy, limit=4)
    run_bootstrap(config, progress=False)
    text_of = {(row["source"], row["id"]): row["text"] for row in outcomes(config)}
    seeds = [row["provenance"]["seed"] for row in outcomes(config)]
    assert len(text_of) == 16 == len(set(seeds))
    for record in (f"photo-{number}" for number in range(4)):
        assert text_of["greedy", record] == text_of["unweakened", record]
        assert len({text_of[key, record] for key in ("greedy", "sample", "sample#1")}) == 3
    groups = read_groups(Path(config.data.groups))
    candidates = {c.type: c.provenance for group in groups for c in group.completions}
    sampled, own = candidates["mllm-sample"], candidates["mllm-greedy"]
    assert (sampled.source, sampled.temperature, sampled.max_new_tokens) == ("sampled-answer", 0.9, 8)
    assert (own.source, own.temperature, own.max_new_tokens) == ("greedy-answer", 0, 8)
    assert any(sum(c.type == "mllm-sample" for c in group.completions) == 2 for group in groups)
    before = outcomes(config)
    more = make("a", sources=["sample"], sample=replace(sample, count=3), limit=4, batch_size=1)
    run_bootstrap(more, progress=False)
    assert outcomes(more)[:16] == before and {row["source"] for row in outcomes(more)[16:]} == {"sample#2"}
    fresh = make("b", sources=["sample"], sample=replace(sample, count=3), limit=4)
    run_bootstrap(fresh, progress=False)
    assert results(fresh) == results(more)  # other batches, and another order


def segment_of(encoder: Encoder, annotation: Annotation) -> tuple[Segment, tuple[int, ...]]:
    ids = encoder.encode_completion(annotation.response)[:-1]
    return cut_segment(ids, derive_seed(0, annotation.id, "segment"), SEGMENT), ids


@pytest.mark.parametrize("ended", [False, True])
def test_the_model_writes_the_segments_tokens_and_start_and_end_of_the_annotation_stay(
    make: MakeConfig, photos: Path, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    config = make("a", sources=["segment"], segment=SEGMENT)
    encoder = load_encoder(config)
    records = read_annotations(photos / "annotations.json").annotations[:4]
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace()))
    source = ImageAnswers("segment", config, TransformersVisionGenerator(model, encoder, config))
    monkeypatch.setattr(TransformersVisionGenerator, "_prefix", lambda *_: None)
    written = encoder.encode_completion("zebra.")[:-1]

    def generate(model: Any, encoder: Encoder, prompts: Sequence[Any], **options: Any) -> list[tuple[str, bool]]:
        assert (options["temperature"], options["top_p"], options["top_k"]) == (0.7, 0.95, 50)
        for prompt, budget, record in zip(prompts, options["max_new_tokens"], records, strict=True):
            segment, _ = segment_of(encoder, record)
            plain = encoder.encode_prompt(record.id, record.images, record.prompt).prefix_ids
            assert prompt.prefix_ids == (*plain, *segment.prefix) and budget == 6
        return [(encoder.decode(join(written, ended)), ended) for join in options["joins"]]

    monkeypatch.setattr(vision_module, "generate_prompts", generate)
    made = list(source.outcomes(records, [source.prepare(record) for record in records]))
    assert any(segment_of(encoder, record)[0].start for record in records)
    for record, outcome in zip(records, made, strict=True):
        segment, ids = segment_of(encoder, record)
        kept = encoder.decode(ids[segment.start + 6 :]) if not ended else ""
        assert outcome.text.startswith(encoder.decode(segment.prefix) + "z") or segment.start == 0
        assert outcome.text.endswith(kept or "zebra.")
        assert len(outcome.text) == len(record.response.strip()) or ended  # the tokenizer's tokens are bytes
        assert (outcome.provenance.top_k, outcome.provenance.max_new_tokens) == (50, 6)
        assert outcome.provenance.kept_words == (len(encoder.decode(segment.prefix).split()) or None)


def test_a_server_continues_the_beginning_of_a_segment_and_the_end_is_added(make: MakeConfig, photos: Path) -> None:
    def answer(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
        return completion("zebra.", "stop" if "photo 2" in str(body["messages"]) else "length")

    records = read_annotations(photos / "annotations.json").annotations[:4]
    with fake_server(answer) as (url, received):
        server = ServerConfig(url=url, model="big", concurrency=1)
        vision = VisionConfig(engine="server", server=server)
        config = make("a", sources=["segment"], segment=SEGMENT, vision=vision)
        encoder = load_encoder(config)
        source = ImageAnswers("segment", config, ChatVisionGenerator(ChatServer(server), config, "big", encoder))
        made = {o.record_id: o.text for o in source.outcomes(records, [source.prepare(record) for record in records])}
        config.model.path = ""
        with pytest.raises(ValueError, match="model.path is empty"):
            run_bootstrap(config, progress=False)
    assert {(body["max_tokens"], body.get("top_k"), body["top_p"]) for body in received} == {(6, 50, 0.95)}
    assert any(body.get("continue_final_message") for body in received)
    for record in records:
        segment, _ = segment_of(encoder, record)
        text, start = record.response, segment.start
        ending = "" if record.id == "photo-2" else text[start + 6 :]
        assert made[record.id] == f"{text[:start]}zebra.{ending}"


def test_the_texts_round_a_segment_have_whole_characters() -> None:
    ids = tuple("Ein Café, schön.".encode())
    inside = ids.index("é".encode()[1])
    segment = Segment(inside, 6, ids[:inside], ids[inside + 6 :])  # from within é to within ö
    assert segment.texts(ids, lambda some: bytes(some).decode("utf-8", "replace")) == ("Ein Caf", "ön.")


@pytest.mark.parametrize(("source", "reason"), [("sample", "unfinished"), ("greedy", "unfinished"), ("weaken", "")])
def test_a_candidate_that_its_budget_cuts_off_is_refused_as_it_may_become_the_preferred_answer(
    make: MakeConfig, photos: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    monkeypatch.setattr(sources_module, "refusal", refusal)
    model: Any = SimpleNamespace(name="m", whole_batches=True, special_tokens=(), encoder=None, policy=None)
    answers = ImageAnswers(source, make("a"), model)
    annotation = read_annotations(photos / "annotations.json").annotations[0]
    outcome = answers.judge(annotation, answers.request(annotation), Reply("A zebra stands on", finished=False))
    assert outcome.reason == reason


def test_parts_of_the_annotations_have_all_of_them_once_and_candidates_may_equal_them(
    make: MakeConfig, photos: Path
) -> None:
    records = json.loads((photos / "annotations.json").read_text())
    del records[3]["conversations"][1]["value"]
    (photos / "annotations.json").write_text(json.dumps(records))
    found, unusable = [], 0
    with fake_server(lambda body, number: completion("There are 4 things."), models=["big"]) as (url, _):
        vision = VisionConfig(engine="server", server=ServerConfig(url=url, model="big"))
        for part in ("1/2", "2/2"):
            config = make(part[0], sources=["greedy"], vision=vision)
            config.data.part = part
            config.data.max_bad_share = 0.5
            unusable += run_bootstrap(config, progress=False).num_quarantined
            found += [group.id for group in read_groups(Path(config.data.groups))]
    assert 0 < len(found) - len(read_groups(Path(config.data.groups))) < 9
    assert unusable == 1 and sorted(found) == [f"photo-{number}" for number in range(9) if number != 3]
