"""The gradient of a batch does not depend on how it is divided.

Packing, number of ranks, accumulation and ZeRO stage, with weighted pairs, and text-only groups among those with
images: on two ranks that take one group at a time, one runs the vision tower while the other's group has no image.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bpo.data.collate import collate_groups
from bpo.data.encode import load_encoder
from bpo.formats.files import read_groups
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.load import load_model
from bpo.model.policy import PolicyModel, model_inputs
from tests.gradient_matrix import REFERENCE_SCALE, config_of
from tests.test_train import launch, write_groups
from tests.tiny import tiny_llava, tiny_qwen
from tests.tiny_families import tiny_gemma3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

# The division of the batch may change only the order of fp32 sums. Relative to the largest entry of a gradient; 1.1e-6
# was measured.
TOLERANCE = 5e-6
# Softmax ignores a constant added to every key: these gradients are 0 up to rounding.
VANISHING = re.compile(r"vision_tower\..*\.k_proj\.bias$")
VANISHING_BOUND = 3e-7
CASES = {
    1: ("llava:0:100000", "llava:3:1"),
    2: (
        "llava:0:300",
        "llava:1:1",
        "llava:2:300:selective",
        "llava:3:1",
        "llava:3:300:full",
        "llava:3:300:selective",
        "qwen:3:1:selective",
        "gemma3:3:1",  # separate sequences: padded rows, each image encoded once for the rows of its group
        "gemma3:2:300",
    ),
}
TEXT_ONLY = (1, 2, 5, 6, 7)
WEIGHTS = {0: (2.0, 0.25), 1: (1.0, 3.5, 0.125), 3: (0.5, 0.0, 1.75), 8: (1.0, 0.0625)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gradients")
    write_groups(root, 12)
    path = root / "groups.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for number in TEXT_ONLY:
        records[number]["images"] = []
    for number, weights in WEIGHTS.items():
        for completion, weight in zip(records[number]["completions"], weights, strict=True):
            completion["weight"] = weight
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    tiny_llava(root / "llava")
    tiny_qwen(root / "qwen")
    tiny_gemma3(root / "gemma3")
    words = [f"{num_ranks}:{case}" for num_ranks, cases in CASES.items() for case in cases]
    result = launch([sys.executable, "tests/gradient_matrix.py", str(root), *words])
    assert result.returncode == 0, result.stdout[-6000:]
    return root


@pytest.fixture(scope="module")
def truth(root: Path) -> dict[str, dict[str, Any]]:
    """Plain PyTorch: one group at a time, the loss written out, one process without DeepSpeed and without stand-ins."""
    results = {}
    for name in ("llava", "qwen", "gemma3"):
        config = config_of(root, f"{name}:0:1")
        encoder = load_encoder(config)
        policy = PolicyModel(load_model(config.model, for_training=True))
        total, num_pairs = 0.0, 0
        for group in read_groups(root / "groups.jsonl"):
            kept = tuple(completion for completion in group.completions if completion.weight)
            encoded = encoder.encode_group(replace(group, completions=kept))
            batch = collate_groups([encoded], encoder.family)  # type: ignore[list-item]
            assert bool(batch.image_inputs) == bool(group.images)
            with packed_layout(batch.layout):
                logp_N = policy(**model_inputs(batch.to(torch.device("cpu"), torch.float32)))
                per_completion = logp_N.split([end - start for start, end in batch.layout.completion_spans[0]])
                loss = torch.zeros(())
                for better, worse in batch.loss_inputs.pairs_P2.tolist():
                    ratio = [logp.sum() - REFERENCE_SCALE * logp.detach().sum() for logp in per_completion]
                    preference = F.softplus(-config.loss.beta * (ratio[better] - ratio[worse]))
                    nll = -per_completion[better].mean()
                    weight = kept[better].weight * kept[worse].weight
                    loss = loss + weight * (preference + config.loss.chosen_nll_weight * nll)
                loss.backward()
            total += float(loss.detach())
            num_pairs += len(batch.loss_inputs.pairs_P2)
        gradients = {n: p.grad / num_pairs for n, p in policy.model.named_parameters() if p.grad is not None}
        results[name] = {"loss": total / num_pairs, "gradients": gradients}
    return results


@pytest.mark.parametrize(("num_ranks", "case"), [(n, case) for n, cases in CASES.items() for case in cases])
def test_the_gradient_is_that_of_the_batch_however_it_is_divided(root: Path, truth, num_ranks: int, case: str) -> None:
    result = torch.load(root / f"{num_ranks}-{case}.pt", weights_only=True)
    expected = truth[case.split(":")[0]]
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert expected["gradients"].keys() <= result["gradients"].keys()
    for name, gradient in result["gradients"].items():
        if name not in expected["gradients"]:
            assert gradient is None or not gradient.any(), name
            continue
        scale = float(expected["gradients"][name].abs().max())
        if VANISHING.search(name):
            assert max(scale, float(gradient.abs().max())) < VANISHING_BOUND, name
            continue
        torch.testing.assert_close(gradient, expected["gradients"][name], atol=TOLERANCE * scale, rtol=0, msg=name)


def test_ranks_without_images_ran_beside_ranks_with_them(root: Path) -> None:
    """A case that the comparison above would miss if every micro-batch had an image."""
    stand_ins = torch.load(root / "2-llava:3:1.pt", weights_only=True)["stand_ins"]
    assert any(a != b for a, b in zip(*stand_ins, strict=True))
    assert sum(map(sum, stand_ins)) >= len(TEXT_ONLY)


def test_every_part_of_the_model_has_a_gradient_to_compare(truth) -> None:
    for part in ("vision_tower", "multi_modal_projector", "language_model.layers.1", "lm_head"):
        assert any(float(g.abs().max()) > 1e-4 for n, g in truth["llava"]["gradients"].items() if part in n), part
