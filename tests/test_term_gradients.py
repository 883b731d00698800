"""The gradient of a list of terms does not depend on how its batch is divided: views, anchors, pairs across groups.

Compared with a loss written out over one ordinary sequence per cell: packing, ranks, accumulation, ZeRO stage and
gradient checkpointing change nothing but the order of sums.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bpo.data.cells import view_of
from bpo.data.collate import collate_groups
from bpo.data.encode import EncodedGroup, load_encoder
from bpo.data.groups import GroupDataset
from bpo.data.token_weights import WeighedSide, changed_weights
from bpo.formats.files import read_groups
from bpo.losses.program import LossProgram
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.load import load_model
from tests.gradient_matrix import LOSSES, REFERENCE_SCALE, config_of
from tests.test_train import launch, write_groups
from tests.tiny import tiny_llava, tiny_qwen

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TOLERANCE = 5e-6
VANISHING = re.compile(r"vision_tower\..*\.k_proj\.bias$")
VANISHING_BOUND = 3e-7
CASES = {
    1: ("llava:0:100000:none:mdpo", "llava:0:100000:none:terms", "llava:3:1:none:terms"),
    2: (
        "llava:2:700:full:mdpo",
        "llava:3:1:selective:mdpo",
        "llava:1:1:none:terms",
        "llava:2:700:full:terms",
        "llava:3:700:selective:terms",
        "qwen:3:1:full:terms",
    ),
}
# Four preference pairs, each of a group of its own, however they are packed.
PACKINGS = ("=4", "=1+3", "=2+2")
PACKED = [(n, f"llava:2:{packing}:none:{loss}") for loss in ("", "terms") for n in (1, 2) for packing in PACKINGS]
WEIGHTS = {0: (2.0, 0.25), 3: (0.5, 0.0, 1.75)}
BETAS = {1: (1.0, 0.5, 2.0)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("terms")
    write_groups(root, 7)
    path = root / "groups.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for field, values in (("weight", WEIGHTS), ("beta", BETAS)):
        for number, of_group in values.items():
            for completion, value in zip(records[number]["completions"], of_group, strict=True):
                completion[field] = value
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    single = [record for record in records if len(record["completions"]) == 2]
    (root / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in single))
    tiny_llava(root / "llava")
    tiny_qwen(root / "qwen")
    words = [f"{num_ranks}:{case}" for num_ranks, cases in CASES.items() for case in cases]
    words += [f"{num_ranks}:{case}" for num_ranks, case in PACKED]
    result = launch([sys.executable, "tests/gradient_matrix.py", str(root), *words])
    assert result.returncode == 0, result.stdout[-6000:]
    return root


class Truth:
    """A model in plain PyTorch, one sequence [prefix | completion] per cell, without kernels, packing or DeepSpeed."""

    def __init__(self, root: Path, model: str, loss: str):
        config = config_of(root, f"{model}:0:1:none:{loss}")
        self.encoder = load_encoder(config)
        self.model = load_model(config.model, for_training=True)
        plan = LossProgram(config.loss, config.train.seed).plan
        groups = list(read_groups(root / "groups.jsonl"))
        self.dataset = GroupDataset(groups, self.encoder, max_words=350, types=(), plan=plan)
        self.groups: list[EncodedGroup] = [self.dataset.encode(index) for index in range(len(groups))]

    def logits(self, group: EncodedGroup, view: str, completion: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, V] that predict the tokens [N] of a completion under a view."""
        prompt, ids = view_of(group, view)
        batch = collate_groups([EncodedGroup(prompt, (ids[completion],), (0.0,))], self.encoder.family)
        positions_X1T = batch.position_ids_XT[:, None]
        with packed_layout(batch.layout):
            hidden_TD = self.model.model(
                input_ids=batch.input_ids_T[None],
                position_ids=positions_X1T[0] if len(positions_X1T) == 1 else positions_X1T,
                use_cache=False,
                **batch.image_inputs,
            ).last_hidden_state[0]
        return F.linear(hidden_TD[batch.predictor_rows_N], self.model.lm_head.weight), batch.target_N

    def tokens(self, group: EncodedGroup, view: str, completion: int, argmax_of: str | None = None) -> torch.Tensor:
        """Log-probs [N] of a cell."""
        logits_NV, target_N = self.logits(group, view, completion)
        if argmax_of is not None:
            target_N = self.logits(group, argmax_of, completion)[0].argmax(1)
        return F.log_softmax(logits_NV.double(), dim=1).gather(1, target_N[:, None])[:, 0]


def ratio(logp_N: torch.Tensor) -> torch.Tensor:
    return (logp_N - REFERENCE_SCALE * logp_N.detach()).sum()


def weighed_ratio(logp_N: torch.Tensor, own: tuple[int, ...], other: tuple[int, ...]) -> torch.Tensor:
    side = WeighedSide(own, other, is_chosen=True, data=())
    weight_N = torch.tensor(changed_weights(side, {"gamma": 5.0, "smallest_match": 1}))
    return (weight_N * (logp_N - REFERENCE_SCALE * logp_N.detach())).sum() / weight_N.sum()


def written_out(truth: Truth, loss: str) -> torch.Tensor:
    """The loss of all groups as one step."""
    total, rows = torch.zeros((), dtype=torch.float64), []
    for group in truth.groups:
        for better, a in enumerate(group.scores):
            for worse, b in enumerate(group.scores):
                if a <= b:
                    continue
                weight = (group.weights or (1.0,) * 9)[better] * (group.weights or (1.0,) * 9)[worse]
                beta = (group.betas or (1.0,) * 9)[better] * (group.betas or (1.0,) * 9)[worse]
                chosen, rejected = truth.tokens(group, "", better), truth.tokens(group, "", worse)
                cropped = truth.tokens(group, "crop", better)
                text = ratio(chosen) - ratio(rejected)
                image = F.softplus(-0.3 * beta * (ratio(chosen) - ratio(cropped)))
                if loss == "mdpo":
                    anchor = F.softplus(-0.5 * beta * ratio(chosen))
                    total = total + weight * (F.softplus(-0.5 * beta * text) + 0.7 * image + 0.4 * anchor)
                    rows.append(None)
                    continue
                second = truth.tokens(group, "", better, argmax_of="noise")
                ids = group.completion_ids
                changed = weighed_ratio(chosen, ids[better], ids[worse]) - weighed_ratio(
                    rejected, ids[worse], ids[better]
                )
                total = total + weight * (
                    0.8 * F.softplus(-0.5 * beta * text)
                    + 0.5 * image
                    + 0.4 * F.softplus(-0.5 * beta * changed)
                    + 0.3 * F.softplus(-0.5 * beta * (ratio(chosen) - ratio(second)))
                    - 0.1 * chosen.mean()
                )
                rows.append((weight, 0.5 * beta, ratio(chosen), ratio(rejected)))
    if loss == "terms":
        count = len(rows)
        for i, (weight, beta, chosen, _) in enumerate(rows):
            losses = [F.softplus(-beta * (chosen - rejected)) for _, _, _, rejected in rows]
            others = sum(losses[j] for j in range(count) if j != i) / (count - 1)
            total = total + 0.7 * weight * (0.8 * losses[i] + 0.2 * others)
    return total / len(rows)


@pytest.fixture(scope="module")
def truths(root: Path) -> dict[tuple[str, str], dict[str, Any]]:
    results = {}
    for model, loss in sorted({(c.split(":")[0], c.split(":")[4]) for cases in CASES.values() for c in cases}):
        truth = Truth(root, model, loss)
        total = written_out(truth, loss)
        total.backward()
        gradients = {n: p.grad for n, p in truth.model.named_parameters() if p.grad is not None}
        results[model, loss] = {"loss": float(total.detach()), "gradients": gradients}
    return results


@pytest.mark.parametrize(("num_ranks", "case"), [(n, case) for n, cases in CASES.items() for case in cases])
def test_the_gradient_is_that_of_the_list_however_its_batch_is_divided(
    root: Path, truths, num_ranks: int, case: str
) -> None:
    result = torch.load(root / f"{num_ranks}-{case}.pt", weights_only=True)
    model, *_, loss = case.split(":")
    expected = truths[model, loss]
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for name, truth in expected["gradients"].items():
        scale = float(truth.abs().max())
        gradient = result["gradients"][name]
        if VANISHING.search(name):
            assert max(scale, float(gradient.abs().max())) < VANISHING_BOUND, name
            continue
        torch.testing.assert_close(gradient, truth, atol=TOLERANCE * scale, rtol=0, msg=name)


@pytest.mark.parametrize(("num_ranks", "case"), PACKED)
def test_four_pairs_have_one_gradient_however_they_are_packed(root: Path, num_ranks: int, case: str) -> None:
    _, _, packing, _, loss = case.split(":")
    standard = torch.load(root / f"1-llava:2:=4:none:{loss}.pt", weights_only=True)
    result = torch.load(root / f"{num_ranks}-{case}.pt", weights_only=True)
    sizes = [len(groups) for of_rank in result["packed"] for groups in of_rank]
    assert sizes == [int(size) for size in packing[1:].split("+")]
    assert len(result["packed"]) == num_ranks
    assert result["loss"] == pytest.approx(standard["loss"], rel=1e-6)
    for name, expected in standard["gradients"].items():
        if expected is None or VANISHING.search(name):
            continue
        scale = float(expected.abs().max())
        torch.testing.assert_close(result["gradients"][name], expected, atol=TOLERANCE * scale, rtol=0, msg=name)


def test_the_lists_have_all_parts() -> None:
    """A case that the comparison above would miss if a term were left out of the lists."""
    assert [term.pairs or "text" for term in LOSSES["mdpo"].terms] == ["text", "image", "chosen"]
    assert LossProgram(LOSSES["mdpo"]).in_kernel == (0, 1, 2)
    assert LossProgram(LOSSES["terms"]).couples_groups and not LossProgram(LOSSES["terms"]).in_kernel
