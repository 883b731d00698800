"""Log-probs extrapolated beyond the policy: against whole logits, and in runs of SPA."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bpo.config.loss import LossConfig, TermConfig
from bpo.config.training import Config, ModelConfig, TrainableConfig, TrainConfig
from bpo.losses.program import LossProgram
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.load import load_model
from bpo.model.policy import PolicyModel, model_inputs
from bpo.records import HeadRequest
from bpo.training.extrapolation import check_extrapolation
from tests.sample_groups import encoder_of, packed_batch, three_groups
from tests.test_train import launch, metrics, write_groups
from tests.tiny import tiny_llava


@pytest.mark.parametrize("bias", [False, True])
def test_extrapolated_log_probs_are_those_of_whole_logits(tiny_llava_dir: Path, photo_root: Path, bias: bool) -> None:
    model = load_model(ModelConfig(path=str(tiny_llava_dir), dtype="float32"), for_training=True)
    policy = PolicyModel(model.requires_grad_(False))
    head = model.lm_head
    if bias:
        head.bias = torch.nn.Parameter(torch.linspace(-3, 3, head.out_features), requires_grad=False)
    batch = packed_batch(encoder_of(tiny_llava_dir, photo_root), three_groups())
    lam = 0.5

    def run(**options: Any) -> Any:
        with packed_layout(batch.layout):
            return policy(**model_inputs(batch), **options)

    reference_ND = run(hidden_only=True)
    reference_NV = torch.nn.functional.linear(reference_ND, head.weight, head.bias)
    request: dict[str, Any] = {"loss_inputs": batch.loss_inputs, "request": HeadRequest(extrapolation=lam)}
    *_, logp_N, _, _, same_N = run(reference_ND=reference_ND, **request)
    assert torch.equal(same_N, logp_N)  # the policy is still the reference

    projector = model.get_submodule("model.multi_modal_projector").requires_grad_(True)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    logits_NV = torch.nn.functional.linear(run(hidden_only=True), head.weight, head.bias)
    plain_NV = ((1 + lam) * logits_NV - lam * reference_NV).log_softmax(1)
    _, logp_N, _, _, extrapolated_N = run(reference_ND=reference_ND, **request)
    assert not extrapolated_N.requires_grad and logp_N.requires_grad
    torch.testing.assert_close(extrapolated_N, plain_NV.gather(1, batch.target_N[:, None])[:, 0], atol=2e-5, rtol=1e-5)
    assert float((extrapolated_N - logp_N).detach().abs().max()) > 0.1
    with pytest.raises(AssertionError):
        run(**request)  # without the reference's hidden states


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("extrapolation")
    write_groups(root, 8)
    tiny_llava(root / "llava")
    result = launch([sys.executable, "-m", "tests.training.extrapolation_job", str(root)], timeout_s=200)
    assert result.returncode == 0, result.stdout[-6000:]
    assert result.stdout.count("extrapolation: each micro-batch takes another forward pass") == 2
    return root


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["dpo", "passes", "judged"])
def test_a_step_judges_by_the_policy_before_its_first_step(runs: Path, name: str) -> None:
    steps = json.loads((runs / "observed.json").read_text())[name]
    assert [len(step) for step in steps] == [len(steps[0])] * 3 and steps[0]
    for step in steps:
        assert [seen for _, seen in step] == pytest.approx([expected for expected, _ in step], abs=2e-4)
    assert max(abs(seen) for _, seen in steps[2]) > 0.5


def test_the_reference_leaves_no_trace_in_the_gradient(runs: Path) -> None:
    """Under ZeRO-3, without smoothing: as without its forward passes."""
    without, passes = metrics(runs, "dpo"), metrics(runs, "passes")
    for key in ("loss", "grad_norm", "logps/chosen"):
        assert [step[key] for step in passes] == [step[key] for step in without]


def test_labels_are_smoothed_after_the_share_of_steps_and_held_out_groups_are_judged_too(runs: Path) -> None:
    steps = [step for step in metrics(runs, "judged") if "loss" in step]
    margins = json.loads((runs / "observed.json").read_text())["judged"]
    manifest = json.loads((runs / "judged/checkpoints/step-00000003/manifest.json").read_text())
    assert sorted(manifest["loss_states"]["spa"]["margins"]) == sorted(seen for step in margins for _, seen in step)
    assert steps[1]["loss"] < 0.1 < steps[2]["loss"]  # DPO's, then half smoothed by 0.5
    evaluated = [step["eval/loss"] for step in metrics(runs, "judged") if "eval/loss" in step]
    assert len(evaluated) == 2 and evaluated[1] != evaluated[0]


SPA = LossConfig(terms=[TermConfig(), TermConfig(type="spa", options={"extrapolation": 0.5})])
FULL = TrainableConfig(language="full")
REFUSED = [
    (Config(loss=SPA, trainable=FULL), None, "the LM head is trained, .* set trainable.lm_head: frozen, or set 0"),
    (Config(loss=SPA), 30.0, "the model caps its logits"),
    (Config(loss=SPA, train=TrainConfig(reference_model="other")), None, "the reference is train.reference_model"),
]


@pytest.mark.parametrize(("config", "cap", "message"), REFUSED, ids=str)
def test_a_reference_without_the_policys_linear_head_is_refused(config: Config, cap: Any, message: str) -> None:
    text = SimpleNamespace(final_logit_softcapping=cap)
    model_config = SimpleNamespace(get_text_config=lambda: text)
    with pytest.raises(ValueError, match=rf"^loss.terms\[1\].options.extrapolation is 0.5: {message}"):
        check_extrapolation(config, LossProgram(config.loss), model_config)
    check_extrapolation(replace(config, loss=LossConfig(type="spa")), LossProgram(LossConfig(type="spa")), model_config)


def test_a_frozen_head_or_lora_is_accepted() -> None:
    model_config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    for trainable in (TrainableConfig(), replace(FULL, lm_head="frozen"), TrainableConfig(language="frozen")):
        check_extrapolation(Config(loss=SPA, trainable=trainable), LossProgram(SPA), model_config)
