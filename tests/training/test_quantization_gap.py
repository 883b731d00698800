"""Runs on quantised weights: the first step, checkpoints, resumption, and the distance to unquantised weights."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bpo.training.quantization_gap import distance
from tests.test_train import launch, metrics, write_groups
from tests.tiny import tiny_llava


@pytest.mark.parametrize("bias", [False, True])
def test_distance_is_that_of_whole_distributions(bias: bool) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=bias).requires_grad_(False)
    quantized_ND, original_ND, target_N = torch.randn(300, 8), torch.randn(300, 8), torch.randint(50, (300,))
    p, q = (torch.distributions.Categorical(logits=head(hidden_ND)) for hidden_ND in (original_ND, quantized_ND))
    delta_N = (q.log_prob(target_N) - p.log_prob(target_N)).abs()
    gap = distance(head, quantized_ND, original_ND, target_N)
    assert gap["tokens"] == 300
    assert gap["kl"] == pytest.approx(float(torch.distributions.kl_divergence(p, q).mean()), rel=1e-4)
    assert (gap["mean_abs"], gap["max_abs"]) == pytest.approx((float(delta_N.mean()), float(delta_N.max())), rel=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    kind = "nf4" if importlib.util.find_spec("bitsandbytes") else "int8"
    root = tmp_path_factory.mktemp(kind)
    write_groups(root)
    tiny_llava(root / "llava")
    result = launch([sys.executable, "-m", "tests.training.quantized_job", str(root), kind])
    assert result.returncode == 0, result.stdout[-6000:]
    return root, kind, result.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_on_quantised_weights(run: tuple[Path, str, str]) -> None:
    root, kind, log = run
    first = metrics(root, "whole")[0]
    assert first["preference_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert "largest token log-prob gap 0.00e+00" in log  # policy and reference are quantised alike
    assert (
        json.loads((root / "whole/reference/fingerprint.json").read_text())["fingerprint"]["model.quantization"] == kind
    )
    # A checkpoint holds what was trained, and a resumed run is the uninterrupted one.
    states = []
    for name in ("whole", "part"):
        (file,) = (root / name / "checkpoints" / "step-00000004").glob("*.safetensors")
        with safe_open(file, "pt") as tensors:
            states.append({key: tensors.get_tensor(key) for key in tensors.keys()})  # noqa: SIM118
        assert file.stat().st_size < 200_000  # twelve bytes per trained parameter
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    refused = json.loads((root / "refused.json").read_text())
    assert "ds_configs/zero3.json is ZeRO-3" in refused and "ds_configs/zero2.json" in refused


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_distance_is_printed_and_recorded_once(run: tuple[Path, str, str]) -> None:
    root, kind, log = run
    gap = json.loads((root / "whole" / "quantization.json").read_text())
    assert gap["quantization"] == kind and gap["tokens"] > 50 and 0 < gap["mean_abs"] < gap["max_abs"]
    assert 1e-7 < gap["kl"] < {"int8": 1e-3, "nf4": 0.1}[kind]
    assert log.count(f"{kind} against unquantised weights: log-probs of {gap['tokens']} tokens differ by") == 1
    assert not (root / "part" / "quantization.json").exists()  # a resumed run does not measure again
