"""Every registered loss shows itself in a whole run: at margins that are not zero, its own loss and its own gradient.

A trainer that ignored `loss.type` would train DPO in silence: most losses are log 2 at the reference, and all fall.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bpo.losses import terms  # noqa: F401 it registers the losses
from bpo.losses.registry import LOSSES
from tests.test_train import launch, losses, metrics, write_groups
from tests.tiny import tiny_llava

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NAMES = tuple(LOSSES)  # other tests may register plug-ins
# Two names of one loss.
SAME = {"nll", "sft"}
TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of each loss, on groups that also have another image with its answer."""
    root = tmp_path_factory.mktemp("losses")
    write_groups(root, 8)
    path = root / "groups.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    others = [(record["images"], record["completions"][0]) for record in records]
    for record, (images, completion) in zip(records, others[1:] + others[:1], strict=True):
        record["other_images"] = images
        record["completions"].append({**completion, "view": "other"})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    tiny_llava(root / "llava")
    result = launch([sys.executable, "tests/loss_types.py", str(root)])
    assert result.returncode == 0, result.stdout[-6000:]
    return root


@pytest.fixture(scope="module")
def observed(runs: Path) -> dict[str, list[dict[str, Any]]]:
    return json.loads((runs / "observed.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_the_logged_loss_and_gradient_are_those_of_the_loss_by_its_name(runs: Path, observed, name: str) -> None:
    assert len(metrics(runs, name)) == len(observed[name]) == 3
    for logged, truth in zip(metrics(runs, name), observed[name], strict=True):
        assert logged["loss"] == pytest.approx(sum(truth["terms"]), rel=TOLERANCE, abs=1e-6)
        assert logged["grad_norm"] == pytest.approx(truth["grad_norm"], rel=10 * TOLERANCE)
        if len(truth["terms"]) > 1:
            assert logged[f"loss/{name}"] == pytest.approx(truth["terms"][-1], rel=TOLERANCE, abs=1e-6)
    assert observed[name][-1]["margin"] > 0.1, "policy and reference must differ, or the comparison says little"
    assert observed[name][-1]["grad_norm"] > 0.01


def test_no_two_losses_train_alike(runs: Path) -> None:
    """Losses and gradients of the third step differ by more than any rounding."""
    for one, other in itertools.combinations(NAMES, 2):
        if {one, other} != SAME:
            a, b = metrics(runs, one)[-1], metrics(runs, other)[-1]
            assert a["loss"] != pytest.approx(b["loss"], rel=1e-3), (one, other)
            assert a["grad_norm"] != pytest.approx(b["grad_norm"], rel=1e-3), (one, other)


@pytest.mark.parametrize("name", [name for name in NAMES if LOSSES[name].kernel])
def test_the_kernels_and_the_general_path_give_the_same_loss(runs: Path, observed, name: str) -> None:
    """On the reference of the store; the log-probs before the first step, above, give the same loss too."""
    for loss, truth in zip(losses(runs, name), observed[name], strict=True):
        assert truth["in_kernel"] and loss == pytest.approx(truth["general"], rel=TOLERANCE)
