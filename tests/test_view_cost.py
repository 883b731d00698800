"""A loss costs what its packed tokens cost: no second forward pass, and no answer or image that no term needs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bpo.config.loss import LossConfig, TermConfig, ViewConfig
from bpo.config.training import TrainableConfig
from bpo.data import encode
from bpo.data.encode import EncodedGroup
from bpo.data.groups import GroupDataset
from bpo.losses.program import HeadOutput, LossProgram
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.policy import PolicyModel, model_inputs
from bpo.records import Completion, GroupBatch, PreferenceGroup
from tests.sample_groups import encoder_of, turn
from tests.test_train import launch, write_groups
from tests.tiny import tiny_llava
from tests.training.test_flops import executed_work, forward_of_all_layers, prepared
from tests.view_cost_worker import NUM_GROUPS

VIEWS = {"crop": ViewConfig(type="crop"), "other": ViewConfig(type="other")}
DPO = LossConfig()
MDPO = LossConfig(
    terms=[
        TermConfig(),
        TermConfig(name="image", pairs="image", against="crop"),
        TermConfig(name="anchor", pairs="chosen"),
    ],
    views=VIEWS,
)
OTHER = LossConfig(terms=[TermConfig(), TermConfig(name="image", pairs="image", against="other")], views=VIEWS)
PROMPT = "Describe everything that can be seen in this picture, from the left to the right, in a few sentences."


def groups() -> list[PreferenceGroup]:
    """Two groups with answers of different lengths and another image."""
    return [
        PreferenceGroup(
            f"g{k}",
            ("wide.png",),
            (turn(None, PROMPT[k:]),),
            (Completion("a cat and a dog on a mat " * 2, 1.0, "gt"), Completion("no dog" * (3 + k), 0.0, "gt")),
            other_images=("tall.png",),
        )
        for k in range(2)
    ]


def dataset_of(loss: LossConfig, model: Path, photos: Path) -> GroupDataset:
    plan = LossProgram(loss).plan
    return GroupDataset(groups(), encoder_of(model, photos), max_words=350, types=(), plan=plan)


def encoded(loss: LossConfig, model: Path, photos: Path) -> list[EncodedGroup]:
    dataset = dataset_of(loss, model, photos)
    found = [dataset.encode(index) for index in range(len(dataset))]
    assert all(isinstance(group, EncodedGroup) for group in found), found
    return found  # type: ignore[return-value]


def batch_of(loss: LossConfig, model: Path, photos: Path) -> GroupBatch:
    of_loss = encoded(loss, model, photos)
    return dataset_of(loss, model, photos).collate(of_loss, [], for_reference=False, is_filler=False)


def counted(policy: PolicyModel, batch: GroupBatch, loss: LossConfig) -> FlopCounterMode:
    """FLOPs of the forward and backward pass of a loss; SDPA runs as plain products, which PyTorch counts."""
    program, counter = LossProgram(loss), FlopCounterMode(display=False)
    batch = batch.with_reference(torch.zeros(len(batch.target_N)))
    request = program.request(batch.loss_inputs)
    with counter, sdpa_kernel(SDPBackend.MATH), packed_layout(batch.layout):
        head = policy(**model_inputs(batch), loss_inputs=batch.loss_inputs, request=request)
        program.apply(HeadOutput(*head), batch.loss_inputs).total.backward()
    return counter


def products_of_the_language_model(counter: FlopCounterMode) -> int:
    """FLOPs of products with weights, which have as many rows as there are packed tokens."""
    name = next(name for name in counter.get_flop_counts() if name.endswith(".language_model"))
    of_operators: dict[Any, int] = counter.get_flop_counts()[name]
    return sum(of_operators.get(operator, 0) for operator in (torch.ops.aten.mm, torch.ops.aten.addmm))


def test_mdpo_costs_what_its_tokens_cost(tiny_llava_dir: Path, photo_root: Path) -> None:
    policy, flops = prepared(tiny_llava_dir, TrainableConfig(language="full", vision="full"))
    batches = {name: batch_of(loss, tiny_llava_dir, photo_root) for name, loss in (("dpo", DPO), ("mdpo", MDPO))}
    counters = {
        name: counted(policy, batch, loss) for (name, batch), loss in zip(batches.items(), (DPO, MDPO), strict=True)
    }
    for name, batch in batches.items():
        work = executed_work(batch, batch.useful_work)
        expected = forward_of_all_layers(policy, work) + flops.backward(work)
        assert counters[name].get_total_flops() == pytest.approx(expected, rel=0.01), name
    tokens = {name: batch.input_ids_T.numel() for name, batch in batches.items()}
    for name in batches:
        assert batches[name].useful_work.tokens == tokens[name]
    crops = [len(g.prompt.prefix_ids) + len(g.completion_ids[0]) for g in encoded(DPO, tiny_llava_dir, photo_root)]
    assert tokens["mdpo"] == tokens["dpo"] + sum(crops)
    products = {name: products_of_the_language_model(counter) for name, counter in counters.items()}
    assert products["mdpo"] / products["dpo"] == pytest.approx(tokens["mdpo"] / tokens["dpo"], rel=0.001)
    assert batches["mdpo"].useful_work.patches == 2 * batches["dpo"].useful_work.patches


def test_fine_tuning_packs_no_rejected_answer(tiny_llava_dir: Path, photo_root: Path) -> None:
    batch = batch_of(LossConfig(type="sft"), tiny_llava_dir, photo_root)
    expected = [(*g.prompt.prefix_ids, *g.completion_ids[0]) for g in encoded(DPO, tiny_llava_dir, photo_root)]
    assert batch.input_ids_T.tolist() == [token for of_group in expected for token in of_group]


@pytest.mark.parametrize(
    ("loss", "decoded", "images"),
    [
        (DPO, {"wide.png": 1}, 1),
        (LossConfig(views=VIEWS), {"wide.png": 1}, 1),  # views that no term uses
        (LossConfig(type="simpo"), {"wide.png": 1}, 1),
        (MDPO, {"wide.png": 1}, 2),  # the crop is made of the same decoded picture
        (OTHER, {"wide.png": 1, "tall.png": 1}, 2),
    ],
)
def test_only_images_that_a_term_needs_are_decoded(
    loss: LossConfig,
    decoded: dict[str, int],
    images: int,
    tiny_llava_dir: Path,
    photo_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset, counts, load = dataset_of(loss, tiny_llava_dir, photo_root), Counter[str](), encode.load_image

    def counted_load(root: Path, image: str) -> Any:
        counts[image] += 1
        return load(root, image)

    monkeypatch.setattr(encode, "load_image", counted_load)
    group = dataset.encode(0)
    assert isinstance(group, EncodedGroup) and counts == decoded
    batch = dataset.collate([group], [], for_reference=False, is_filler=False)
    assert len(batch.image_inputs["pixel_values"]) == images


@pytest.fixture(scope="module")
def passes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("passes")
    write_groups(root, NUM_GROUPS)
    tiny_llava(root / "llava")
    result = launch([sys.executable, "-m", "tests.view_cost_worker", str(root)], timeout_s=280)
    assert result.returncode == 0, result.stdout[-6000:]
    return json.loads((root / "passes.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "micro_batches", "images"),
    [
        ("dpo", 1, 1),
        ("unused views", 1, 1),
        ("terms", 1, 3),
        ("terms, divided", 2, 3),
        ("across groups", 1, 3),
        ("across groups, divided", 2, 3),
        ("simpo", 1, 1),
        ("sft", 1, 1),
    ],
)
def test_each_micro_batch_has_one_forward_pass(
    passes: dict[str, Any], name: str, micro_batches: int, images: int
) -> None:
    """Whatever the terms: views share the row of the clean image, whose log-probs all terms read."""
    (step,) = passes[name]["steps"]
    assert step == {"micro_batches": micro_batches, "language": micro_batches, "images": images * NUM_GROUPS}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_loss_without_a_reference_runs_no_pass_before_the_first_step(passes: dict[str, Any]) -> None:
    before = {name: run["before_steps"] for name, run in passes.items()}
    assert before["simpo"] == before["sft"] == 0
    assert all(count > 0 for name, count in before.items() if name not in ("simpo", "sft"))
