"""Whole bootstrapping jobs for every source and engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bpo.bootstrap.engines.models import num_prepare_threads
from bpo.bootstrap.inject import InjectionRequest
from bpo.bootstrap.run import run_bootstrap
from bpo.bootstrap.sources import InjectedErrors
from bpo.config.bootstrap import (
    BootstrapConfig,
    InjectConfig,
    ServerConfig,
    ValidateConfig,
    VisionConfig,
    WeakenConfig,
)
from bpo.config.training import Config
from bpo.formats.files import read_groups
from bpo.job.chat_server import Reply, ServerError
from bpo.model.weights import policy_fingerprint
from bpo.records import Annotation, Completion, ContentPart, Turn
from tests.bootstrap.fake_server import completion, fake_server
from tests.checkpoint.test_adapter import adapter

MakeConfig = Callable[..., Config]
SERVER = ServerConfig(url="http://127.0.0.1:8000/v1", model="m")


def quarantined(config: Config) -> list[dict[str, Any]]:
    path = Path(config.data.groups + ".quarantine.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_server_injects_the_errors(make: MakeConfig) -> None:
    def answer(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
        if number == 1:
            return 500, {"error": "starting"}
        asked = body["messages"][-1]["content"]
        if "photo 4" in asked:
            return 400, {"error": "context length"}
        if "photo 6" in asked:
            return completion("There are 6 things.")
        return completion(f'Modified answer: "Wrong {body["seed"]}."')

    with fake_server(answer) as (url, received):
        options = {"server": ServerConfig(url=url, model="big"), "mode": "qa", "attempts": 2}
        config = make("a", inject=options, sources=["inject"], validate=ValidateConfig(max_changed_share=1))
        summary = run_bootstrap(config, progress=False)
    groups = read_groups(Path(config.data.groups))
    assert len(groups) == summary.kept["inject"] == 7
    for group in groups:
        negative = group.completions[1]
        assert negative.response == f"Wrong {negative.provenance.seed}."
        assert (negative.provenance.model, negative.provenance.mode) == ("big", "qa")
    assert summary.refused == {"inject": {"unchanged": 1}}
    (failed,) = quarantined(config)
    assert failed["record"] == "photo-4" and "context length" in failed["error"] and url in failed["error"]
    seeds_of_6 = {body["seed"] for body in received if "photo 6" in body["messages"][-1]["content"]}
    assert len(seeds_of_6) == 2


@pytest.mark.parametrize(("temperature", "attempts"), [(0.8, 3), (0.0, 1)])
def test_a_refused_rewriting_is_asked_for_again_where_that_can_help(temperature: float, attempts: int) -> None:
    class Assistant:
        name, whole_batches, special_tokens, policy = "assistant", False, (), None
        seeds: list[int] = []

        def replies(self, requests: Sequence[InjectionRequest]) -> Iterator[tuple[int, Reply]]:
            for index, request in enumerate(requests):
                self.seeds.append(request.seed)
                yield index, Reply("I'm sorry, but I can't see the image.")

    llm = Assistant()
    config = Config(bootstrap=BootstrapConfig(inject=InjectConfig(temperature=temperature)))
    prompt = (Turn("user", (ContentPart("image"), ContentPart("text", "Describe it."))),)
    annotation = Annotation("r", ("a.png",), prompt, "A cat sits on a mat.")
    (outcome,) = InjectedErrors(config, llm, None, checks_images=False).outcomes([annotation], [None])
    assert (outcome.status, outcome.reason) == ("refused", "refusal")
    assert len(set(llm.seeds)) == len(llm.seeds) == attempts


def test_every_source_of_the_multimodal_model_makes_negatives_of_its_own_type(make: MakeConfig) -> None:
    sources = ["weaken", "crop", "mask", "regenerate", "text-only", "unweakened"]
    config = make("a", sources=sources)
    summary = run_bootstrap(config, progress=False)
    groups = read_groups(Path(config.data.groups))
    by_source = {c.provenance.source: c for group in groups for c in group.completions[1:]}
    types = {source: completion.type for source, completion in by_source.items()}
    assert types == {
        "weakened-image": "mllm-hal",
        "cropped-image": "mllm-crop",
        "masked-image": "mllm-mask",
        "regenerated-end": "mllm-cont",
        "no-image": "mllm-blind",
        "unweakened-image": "mllm-self",
    }
    assert set(summary.kept) == set(sources) and min(summary.kept.values()) > 0
    for group in groups:
        for negative in group.completions[1:]:
            if negative.type == "mllm-cont":
                kept = group.completions[0].response.split()[: negative.provenance.kept_words]
                assert negative.response.startswith(" ".join(kept))


def test_a_server_answers_weakened_pictures_and_a_killed_job_asks_only_for_the_rest(
    make: MakeConfig, photos: Path
) -> None:
    def answer(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
        (picture,) = [part for part in body["messages"][0]["content"] if part["type"] == "image_url"]
        assert picture["image_url"]["url"].startswith("data:image/png;base64,")
        return completion(f"A zebra, number {body['seed']}.") if number != 5 else (403, {"error": "key expired"})

    def job(url: str) -> Config:
        server = ServerConfig(url=url, model="big", concurrency=1)
        config = make(
            "a",
            sources=["weaken"],
            vision=VisionConfig(engine="server", server=server),
            weaken=WeakenConfig(space="pixel"),
        )
        config.model.path = ""  # the server has the weights
        return config

    with fake_server(answer) as (url, received):
        with pytest.raises(ServerError, match="key expired"):
            run_bootstrap(job(url), progress=False)
        summary = run_bootstrap(job(url), progress=False)
    assert len(received) == 9 + 1
    seeds = [body["seed"] for number, body in enumerate(received) if number != 4]
    assert len(set(seeds)) == 9
    assert summary.kept == {"weaken": 9}
    provenance = read_groups(Path(job(url).data.groups))[0].completions[1].provenance
    assert (provenance.space, provenance.noise_step, provenance.model) == ("pixel", 900, "big")


def test_an_adapter_answers_here_or_on_a_server_and_is_named_in_the_provenance(
    make: MakeConfig, tiny_llava_dir: Path, tmp_path: Path
) -> None:
    path = str(adapter(tmp_path / "adapter", tiny_llava_dir))
    policy = policy_fingerprint(path)

    def negatives(folder: str, model: str, **options: Any) -> list[Completion]:
        config = make(folder, sources=["weaken", "inject"], inject={"max_new_tokens": 4}, limit=3, **options)
        config.model.path = model
        run_bootstrap(config, progress=False)
        return [c for group in read_groups(Path(config.data.groups)) for c in group.completions[1:]]

    here, by_base = negatives("a", path), negatives("b", str(tiny_llava_dir))
    assert {c.provenance.policy for c in here} == {policy} and {c.type for c in here} == {"mllm-hal", "llm-hal"}
    assert {c.provenance.policy for c in by_base} == {policy_fingerprint(str(tiny_llava_dir))}
    assert {c.response for c in here}.isdisjoint(c.response for c in by_base)

    served = ["base"]
    with fake_server(lambda body, number: completion(f"A zebra {number}."), models=served) as (url, received):
        server = VisionConfig(engine="server", server=ServerConfig(url=url, model="base"))
        weaken = WeakenConfig(space="pixel")
        there = negatives("c", path, vision=server, weaken=weaken)
        assert {(c.provenance.policy, c.provenance.model) for c in there} == {(policy, f"bpo-{policy}")}
        assert (received[0]["lora_name"], received[0]["lora_path"]) == (f"bpo-{policy}", path)
        assert {body["model"] for body in received[1:]} == {f"bpo-{policy}"} and served == ["base", f"bpo-{policy}"]
        negatives("d", str(tiny_llava_dir), vision=server, weaken=weaken)
        assert {body["model"] for body in received[-6:]} == {"base"}
        server.server.model = "other"
        with pytest.raises(ServerError, match=rf"serves base, bpo-{policy}, not other"):
            negatives("e", str(tiny_llava_dir), vision=server, weaken=weaken)


@pytest.mark.parametrize(
    ("options", "threads"),
    [
        ({}, 1),
        ({"sources": ["inject"]}, 1),
        ({"sources": ["inject"], "inject": InjectConfig(llm="some-llm")}, 1),
        ({"sources": ["inject"], "inject": InjectConfig(llm="some-llm", engine="vllm")}, 8),
        ({"sources": ["inject"], "inject": InjectConfig(server=SERVER)}, 8),
        ({"inject": InjectConfig(server=SERVER)}, 1),
        ({"vision": VisionConfig(engine="vllm"), "weaken": WeakenConfig(space="pixel")}, 8),
        ({"vision": VisionConfig(engine="server", server=SERVER), "weaken": WeakenConfig(space="pixel")}, 8),
        ({"num_workers": 3}, 3),
    ],
)
def test_threads_beside_a_model_in_this_process_are_few(options: dict[str, Any], threads: int) -> None:
    assert num_prepare_threads(Config(bootstrap=BootstrapConfig(**options))) == threads
