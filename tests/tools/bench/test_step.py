"""`bpo bench step`: data of exact lengths, the same adapter for all, comparison, verdicts; one run of each provider."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bpo.data.encode import Dropped, load_encoder
from bpo.data.families import family_of
from bpo.formats.files import group_to_json, read_groups
from bpo.model.load import load_model
from bpo.model.trainable import lora_config, prepare_trainable
from bpo.tools.bench import step
from bpo.tools.bench.case import StepCase, build_case, set_adapter
from bpo.tools.bench.meter import Meter
from bpo.tools.bench.report import Figures, anchor_of, disagreements, judge, preference_loss, ratios, table
from bpo.tools.bench.step import DisagreementError, check_installed, compare_first_steps, main, why_uncounted
from bpo.tools.bench.synthetic import Lengths, byte_tokenizer, llava_config, write_groups, write_model
from bpo.tools.bench.workers import ProviderError, started
from tests.sample_groups import group

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "lora_rank": 2,
    "beta": 0.1,
    "lr": 1e-6,
    "gradient_checkpointing": "none",
    "max_length_tokens": 2048,
}
SMALL = ["--model", "llava-1.5-7b-32nd", "--image-tokens", "4", "--prompt-tokens", "24", "--answer-tokens", "8"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "llava-1.5-7b-32nd", 4, torch.float32, CPU)


@pytest.fixture(scope="module")
def case(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> StepCase:
    folder = tmp_path_factory.mktemp("case")
    groups = write_groups(folder, Lengths(4, 24, 8, 3), 2)
    return build_case(model_dir, groups, folder, 2, folder / "work", **SETTINGS)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((575, 44, 100, 2), "--image-tokens is 575; give a square number"),
        ((576, 18, 100, 2), "--prompt-tokens is 18; the chat template takes 19"),
        ((576, 44, 7, 2), "--answer-tokens is 7; give at least 8"),
        ((576, 44, 100, 1), "--completions is 1; a pair needs at least 2"),
    ],
)
def test_lengths_that_cannot_be_are_refused(lengths: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lengths(*lengths)


def test_an_eighth_keeps_the_shares_of_tower_language_model_and_head() -> None:
    """Matrix products of a step of 620 + 2 x 100 tokens and one image, attention left out."""

    def shares(shape: str) -> list[float]:
        config = llava_config(shape, 576, byte_tokenizer())
        text, vision = config.text_config, config.vision_config
        layer = 4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size
        tower_layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
        work = [
            820 * text.num_hidden_layers * layer,
            577 * vision.num_hidden_layers * tower_layer,
            200 * text.vocab_size * text.hidden_size,
        ]
        return [part / sum(work) for part in work]

    assert shares("llava-1.5-7b-8th") == pytest.approx(shares("llava-1.5-7b"), rel=0.03)


def test_synthetic_groups_have_exactly_the_lengths_asked_for(case: StepCase) -> None:
    encoder = load_encoder(case.config())
    encoded = [encoder.encode_group(one) for one in read_groups(Path(case.groups))]
    assert len(encoded) == 2 and case.num_pairs == 4
    for one in encoded:
        assert not isinstance(one, Dropped)
        assert len(one.prompt.prefix_ids) == 4 + 24 and [len(ids) for ids in one.completion_ids] == [8, 8, 8]
    assert case.num_tokens == 2 * (28 + 24)


def test_rows_spell_the_tokens_of_the_packed_groups(case: StepCase) -> None:
    """What TRL tokenises is what bpo trains on: prompt with its image expanded, answer with its end."""
    encoder = load_encoder(case.config())
    tokenizer = encoder.tokenizer
    encoded = [encoder.encode_group(one) for one in read_groups(Path(case.groups))]
    assert [row.label for row in case.rows] == ["0:0>1", "0:0>2", "1:0>1", "1:0>2"]
    for row in case.rows:
        number, chosen, rejected = map(int, row.label.replace(">", ":").split(":"))
        one = encoded[number]
        assert not isinstance(one, Dropped)
        prompt = tokenizer(row.prompt.replace("<image>", "<image>" * 4), add_special_tokens=False)["input_ids"]
        assert tuple(prompt) == one.prompt.prefix_ids
        for text, place in ((row.chosen, chosen), (row.rejected, rejected)):
            assert tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) == one.completion_ids[place]


def test_a_case_skips_what_cannot_be_trained_on_and_counts_equal_answers_once(
    model_dir: Path, photo_root: Path, tmp_path: Path
) -> None:
    groups = [
        group("broken", "a", "b", image="missing.png"),
        group("twice", ("a cat", 0.0, "x"), ("a dog", 1.0, "gt"), ("a cat", 0.5, "x"), ("no", 0.0, "x")),
    ]
    path = tmp_path / "groups.jsonl"
    path.write_text("".join(json.dumps(group_to_json(one)) + "\n" for one in groups))
    case = build_case(model_dir, path, photo_root, 1, tmp_path / "work", **SETTINGS)
    (kept,) = read_groups(Path(case.groups))
    assert [completion.response for completion in kept.completions] == ["a cat", "a dog", "no"]
    assert [(row.label, row.chosen, row.rejected) for row in case.rows] == [
        ("0:0>2", "a cat</s>", "no</s>"),
        ("0:1>0", "a dog</s>", "a cat</s>"),
        ("0:1>2", "a dog</s>", "no</s>"),
    ]
    with pytest.raises(ValueError, match="1 usable groups, but --num-groups is 2; broken: .*missing.png"):
        build_case(model_dir, path, photo_root, 2, tmp_path / "again", **SETTINGS)


def test_the_adapter_is_the_same_inside_and_outside_a_peft_model(case: StepCase) -> None:
    import peft

    config = case.config()
    ours, theirs = load_model(config.model, for_training=True), load_model(config.model)
    family = family_of(ours.config)
    prepare_trainable(ours, family, config)
    wrapped = peft.get_peft_model(theirs, lora_config(theirs, family, config.lora, case.model))
    assert set_adapter(ours, torch.bfloat16) == set_adapter(wrapped, torch.bfloat16)
    by_name = {name: value for name, value in wrapped.named_parameters() if "lora_" in name}
    assert len(by_name) == 2 * 7
    for name, value in ours.named_parameters():
        if "lora_" in name:
            assert value.abs().max() > 0 and torch.equal(value, by_name[f"base_model.model.{name}"])
    with pytest.raises(ValueError, match="no LoRA adapter"):
        set_adapter(torch.nn.Linear(2, 2), torch.float32)


def test_meter_counts_products_attention_passes_and_memory() -> None:
    class Toy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.language = torch.nn.Identity(), torch.nn.Linear(16, 16, bias=False)

        def forward(self, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            self.tower(pixels)
            q = self.language(tokens)[:, None]
            return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum()

    toy = Toy()
    meter = Meter(toy, "language", "tower", CPU)
    pixels, tokens = torch.zeros(3, 3, 4, 4), torch.randn(2, 10, 16)
    result: dict[str, Any] = {}
    with meter.measure("flops", result):
        toy(pixels, tokens).backward()
    forward = 2 * (2 * 10 * 16 * 16), 2 * 2 * (2 * 10 * 10 * 16)
    # A weight's gradient is one more product; attention's backward computes its scores again: five products for two.
    assert result == {"flops": 2 * forward[0] + 7 * forward[1] // 2, "tokens": 20, "images": 3}
    with meter.measure("memory", result := {}):
        torch.empty(1 << 20, dtype=torch.int8).add_(1)
        torch.empty(1 << 19, dtype=torch.int8).add_(1)
    assert 1 << 20 <= result["peak_bytes"] < 3 << 19
    with meter.measure("time", result := {}):
        pass
    assert 0 <= result["seconds"] < 1 and result["tokens"] == 0


def first_step(**changes: float) -> dict[str, Any]:
    pair = {"chosen": -100.0, "rejected": -110.0, "reference_chosen": -101.0, "reference_rejected": -109.0}
    pair |= {name: value for name, value in changes.items() if name in pair}
    loss = math.log1p(math.exp(-0.1 * 2.0))
    return {"pairs": {"0:0>1": pair}, "loss": changes.get("loss", loss), "grad_norm": changes.get("grad_norm", 3.0)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": -100.5}, "chosen log-probs are -100.0000 and -100.5000: 0.005 nats per token apart"),
        ({"reference_rejected": -108.9}, "reference rejected log-probs"),
        ({"loss": 0.61}, "the losses are 0.598139 and 0.610000"),
        ({"grad_norm": 3.1}, "the gradient norms are 3 and 3.1"),
        ({"chosen": math.nan}, "chosen log-probs"),
        ({"grad_norm": math.nan}, "norms"),
    ],
)
def test_whatever_differs_is_named(changes: dict[str, float], message: str) -> None:
    tokens = {"0:0>1": (100, 100)}
    assert disagreements(first_step(), first_step(), "float32", 0.1, tokens) == []
    found = disagreements(first_step(), first_step(**changes), "float32", 0.1, tokens)
    assert any(message in line for line in found), found


def test_a_loss_that_its_log_probs_do_not_give_is_named_though_both_agree() -> None:
    assert preference_loss(first_step()["pairs"]["0:0>1"], 0.1) == pytest.approx(-math.log(1 / (1 + math.exp(-0.2))))
    same = first_step(loss=0.7)
    found = disagreements(same, same, "float32", 0.1, {"0:0>1": (100, 100)})
    assert [line.split(":")[0] for line in found] == ["bpo", "trl"]


def test_providers_that_disagree_are_not_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings, tokens = SimpleNamespace(dtype="float32", beta=0.1), {"0:0>1": (100, 100)}

    def compare(adapter: str, **changes: float) -> None:
        first = {"bpo": first_step(), "trl-liger": first_step(**changes)}
        facts = {"bpo": {"adapter": "a"}, "trl-liger": {"adapter": adapter}}
        compare_first_steps(first, facts, settings, tokens)  # type: ignore[arg-type]

    compare("a")
    for adapter, changes, message in (("b", {}, "different adapters"), ("a", {"grad_norm": 9.0}, "gradient norms")):
        with pytest.raises(DisagreementError, match=message):
            compare(adapter, **changes)

    def refuse(*args: Any) -> None:
        raise DisagreementError("they differ")

    monkeypatch.setattr(step, "run_case", refuse)
    assert main(["--providers", "bpo", "--json", str(tmp_path / "report.json")]) == 1
    assert "nothing is reported: they differ" in capsys.readouterr().err and not (tmp_path / "report.json").exists()


def test_the_first_step_is_the_first_and_only_variants_of_trl_may_refuse() -> None:
    """A step before the one that is compared would have changed the adapter already."""

    class Fake:
        def __init__(self, fails: bool = False):
            self.fails, self.asked = fails, 0

        def wait_until_ready(self) -> None: ...

        def ask(self, what: str) -> dict[str, Any]:
            self.asked += 1
            if self.fails:
                raise ProviderError("no active drivers\nmore")
            return {"step": self.asked}

    workers = {"bpo": Fake(), "trl": Fake(), "trl-liger": Fake(fails=True)}
    first, refused = step.first_steps(workers)  # type: ignore[arg-type]
    assert first == {"bpo": {"step": 1}, "trl": {"step": 1}} and refused == {"trl-liger": "no active drivers"}
    with pytest.raises(ProviderError):
        step.first_steps({"bpo": Fake(), "trl": Fake(fails=True)})  # type: ignore[arg-type]


def test_flops_that_the_counter_missed_are_left_out_and_the_rest_is_reported() -> None:
    assert why_uncounted(101, 100) is None
    assert "no formula for an operator" in (why_uncounted(90, 100) or "")
    uncounted, counted = Figures(None, 800, 1, 30, (1.0,)), Figures(100, 2880, 4, 90, (2.0,))
    ratio = ratios(uncounted, uncounted, counted, 2)
    assert ratio["flops"] is None and ratio["flops_amortised"] is None and ratio["seconds"]["median"] == 0.5
    case = {"image_tokens": 576, "prompt_tokens": 44, "answer_tokens": 100, "epochs": 2, "completions": 2}
    case |= {"device": "cuda", "model": "llava-1.5-7b"}
    assert [verdict.met for verdict in judge(case, ratio)] == [None, None, True, True]
    figures = {"bpo": vars(uncounted), "trl": vars(counted)}
    shown = table({"case": case, "figures": figures, "refused": {}, "ratios": ratio})
    assert "| bpo, one step | not counted |" in shown and "peak MiB above the weights" in shown


def test_the_variant_with_ligers_layers_is_the_one_to_compare_with() -> None:
    assert anchor_of(["bpo", "trl", "trl-liger"]) == "trl-liger"
    assert anchor_of(["bpo", "trl"]) == "trl" and anchor_of(["bpo"]) is None


def test_device_memory_is_given_back_between_providers_but_not_before_a_timed_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str, bool]] = []

    class Fake:
        def ask(self, what: str, kind: str = "plain", *, keep_cache: bool = False) -> dict[str, Any]:
            asked.append((what, kind, keep_cache))
            return {"seconds": float(len(asked))}

    assert step._seconds(Fake(), "step") == {"seconds": 1.0}  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert step._seconds(Fake(), "step") == {"seconds": 3.0}  # type: ignore[arg-type]
    assert asked == [("step", "time", False), ("step", "time", True), ("step", "time", False)]
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    model = torch.nn.ModuleDict({"language": torch.nn.Identity(), "tower": torch.nn.Identity()})
    Meter(model, "language", "tower", CPU).release()
    assert emptied == []
    Meter(model, "language", "tower", torch.device("cuda")).release()
    assert emptied == [True]


def test_ratios_and_verdicts() -> None:
    ours, reference = Figures(40, 800, 1, 30, (1.0, 2.0, 1.0)), Figures(20, 800, 1, 5, (0.5, 1.0, 0.5))
    theirs = Figures(100, 2880, 4, 90, (2.0, 5.0, 4.0))
    ratio = ratios(ours, reference, theirs, 2)
    assert ratio["flops"] == 0.4 and ratio["flops_amortised"] == 0.5 and ratio["images_amortised"] == 0.375
    assert ratio["seconds"] == {"median": 0.4, "least": 0.25, "largest": 0.5}
    assert ratio["seconds_amortised"]["median"] == pytest.approx(0.5) and ratio["peak_bytes"] == pytest.approx(1 / 3)
    case = {"image_tokens": 576, "prompt_tokens": 44, "answer_tokens": 100, "epochs": 2, "device": "cpu", "model": "x"}
    met = [verdict.met for verdict in judge({**case, "completions": 2}, ratio)]
    assert met == [True, True, True, None, None]
    assert [verdict.met for verdict in judge({**case, "completions": 3}, ratio)] == [False, False, True, None, None]
    assert {verdict.measured for verdict in judge({**case, "completions": 2}, None)} == {"not measured"}
    assert judge({**case, "completions": 2, "answer_tokens": 99}, ratio) == []
    whole = {**case, "completions": 2, "device": "cuda", "model": "llava-1.5-7b"}
    assert [(v.measured, v.met) for v in judge(whole, ratio)[-2:]] == [("2.50x", True), ("0.333x", True)]
    smaller = judge({**whole, "model": "llava-1.5-7b-8th"}, ratio)[-2:]
    assert {v.met for v in smaller} == {None}, "the target is for the whole shape"
    assert all(v.predicted for v in smaller)


def test_options_that_make_no_sense_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for argv, message in (
        (["--providers", "trl"], "--providers must include bpo"),
        (["--num-groups", "0"], "--num-groups 0: give at least 1"),
        (["--groups", "g.jsonl"], "--groups needs a model directory"),
    ):
        with pytest.raises(SystemExit):
            main(argv)
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="neither a directory nor a shape; the shapes are llava-1.5-7b, "):
        write_model(tmp_path, "llava-9b", 4, torch.float32, CPU)


def test_a_missing_library_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_version", lambda package: None if package == "liger-kernel" else "1")
    check_installed(["bpo", "trl"])
    with pytest.raises(ValueError, match=r"trl-liger needs liger-kernel: pip install .*'bpo\[bench\]'"):
        check_installed(["bpo", "trl-liger"])


def test_a_provider_that_fails_says_why(case: StepCase, tmp_path: Path) -> None:
    from dataclasses import replace

    broken = replace(case, groups=str(tmp_path / "gone.jsonl"), workdir=str(tmp_path))
    with started(["bpo"], broken) as workers, pytest.raises(ProviderError, match=r"^bpo: .*gone\.jsonl"):
        workers["bpo"].wait_until_ready()
    assert "Traceback" in (tmp_path / "bpo.log").read_text()


def test_bpo_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    words = ["--providers", "bpo", "--completions", "3", "--num-groups", "1", "--repetitions", "1"]
    assert main([*SMALL, *words, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    (result,) = report["cases"]
    ours, reference = result["figures"]["bpo"], result["figures"]["bpo-reference"]
    assert ours["tokens"] == reference["tokens"] == (4 + 24 + 3 * 8) / 2
    assert ours["images"] == reference["images"] == 0.5
    assert 1.5 < ours["flops"] / reference["flops"] < 3
    assert ours["flops"] * 2 > 0.99 * result["facts"]["useful_flops"]
    first = result["first_step"]["bpo"]
    assert abs(first["loss"] - math.log(2)) > 1e-4, "a loss of log 2 would show nothing"
    assert result["ratios"] is None and result["refused"] == {} and result["targets"] == []
    assert "| bpo, one step |" in capsys.readouterr().out and "| bpo, reference pass |" in table(result)
    assert report["command"].startswith("bpo bench step --model llava-1.5-7b-32nd")


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed: pip install 'bpo[bench]'")
def test_beside_trl(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    words = ["--providers", "bpo", "trl", "--completions", "2", "--num-groups", "2", "--repetitions", "1"]
    assert main([*SMALL, *words, "--json", str(path)]) == 0
    (result,) = json.loads(path.read_text())["cases"]
    ours, theirs = result["figures"]["bpo"], result["figures"]["trl"]
    assert ours["tokens"] == 4 + 24 + 2 * 8 and ours["images"] == 1
    assert theirs["tokens"] == 4 * (4 + 24 + 8) and theirs["images"] == 4
    assert ours["flops"] < 0.6 * theirs["flops"] and result["ratios"]["flops"] == ours["flops"] / theirs["flops"]
    first = result["first_step"]
    assert first["bpo"]["loss"] == pytest.approx(first["trl"]["loss"], abs=1e-4)
    assert first["bpo"]["grad_norm"] == pytest.approx(first["trl"]["grad_norm"], rel=1e-3)
