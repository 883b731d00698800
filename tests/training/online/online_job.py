"""Runs on negatives that the policy makes while it trains: `python -m tests.training.online.online_job DIR`.

`write_inputs` prepares DIR. A run leaves in calls.pt, in order, what the model had as trained weights: the policy's
after each step, and those with which it generated and was the reference.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bpo.bootstrap.engines import vision
from bpo.config.bootstrap import BootstrapConfig, SegmentConfig, ValidateConfig
from bpo.config.online import OnlineConfig
from bpo.config.training import Config, DataConfig, LoraConfig, LossConfig, ModelConfig, TrainConfig
from bpo.data.encode import Encoder, load_encoder
from bpo.job.launch import Ranks
from bpo.job.signals import StopRequest
from bpo.model.load import load_model
from bpo.tools.refs_follow import Follower
from bpo.train import train
from bpo.training import reference_pass
from bpo.training.evaluation import kept_random_state
from bpo.training.online.generate import NegativeMaker
from bpo.training.online.reference import published_reference
from bpo.training.online.steps import OnlineGroups
from tests.ranks import fork_ranks
from tests.sample_groups import PHOTOS, write_photos
from tests.tiny import tiny_llava

NUM_RECORDS, NUM_HELD_OUT = 8, 2
ANSWERS = ("a red cat on the mat", "two dogs near a tree", "one blue car", "three birds under the tree by the car")
LETTERS = "abcdefghijklmnopqrstuvwxyz "


def write_inputs(root: Path) -> None:
    (root / "images").mkdir()
    write_photos(root / "images")
    tiny_llava(root / "llava")
    records, groups = [], []
    for k in range(NUM_RECORDS):
        question, answer, image = f"What is {k}?", f"{ANSWERS[k % len(ANSWERS)]} {k}", list(PHOTOS)[k % len(PHOTOS)]
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        records.append({"id": f"r{k}", "image": image, "conversations": turns})
        completions = [
            {"response": answer, "score": 1, "type": "gt"},
            {"response": "no", "score": 0, "type": "llm-hal"},
        ]
        groups.append({"id": f"r{k}", "images": [image], "prompt": question, "completions": completions})
    (root / "annotations.json").write_text(json.dumps(records))
    (root / "groups.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    for stage in (1, 2, 3):
        zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
        (root / f"stage{stage}.json").write_text(json.dumps({"zero_optimization": zero}))


def config_of(root: Path, name: str, *, stage: int = 1, loss: str = "sigmoid", every: int = 1, **train: Any) -> Config:
    """Six steps of two groups, four per epoch; the reference moves after steps 2 and 4."""
    rules = ValidateConfig(same_language=False, require_real_change=False)
    options = {"epochs": 2, "max_steps": 6, "groups_per_step": 2, "max_micro_batch_tokens": 120, "lr": 5e-3}
    options |= {"save_every_steps": 3, "tensorboard": False, "output_dir": str(root / name), **train}
    return Config(
        model=ModelConfig(path=str(root / "llava"), dtype="float32"),
        data=DataConfig(annotations=str(root / "annotations.json"), image_root=str(root / "images"), num_workers=0),
        bootstrap=BootstrapConfig(segment=SegmentConfig(max_tokens=6), validate=rules),
        lora=LoraConfig(r=4, alpha=8, dropout=0.1),
        loss=LossConfig(type=loss),
        train=TrainConfig(ds_config=str(root / f"stage{stage}.json"), **options),
        online=OnlineConfig(source="segment", reference_every_steps=2, batch_size=2, generate_every_steps=every),
    )


def letters_only(config: Config, model_config: Any = None) -> Encoder:
    """An encoder whose model generates letters and ends only: random bytes are no text."""
    encoder = load_encoder(config, model_config)
    letters = {ids[0] for letter in LETTERS if len(ids := encoder.encode_completion(letter)) == 2}
    allowed = {*letters, *encoder.end_token_ids}
    encoder.suppressed_token_ids = tuple(sorted(set(range(len(encoder.tokenizer))) - allowed))
    return encoder


def trained(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad])


def run(config: Config, ranks: Ranks, stop_at: int = 0) -> None:
    """Trains; with `stop_at`, a signal comes while the negatives of that step are being made."""
    calls: list[tuple[str, torch.Tensor]] = []
    generate, score, after_step = vision.generate_prompts, reference_pass.score_groups, OnlineGroups.after_step
    stop, answer = StopRequest(), NegativeMaker.answer

    def recorded_generate(model: Any, *arguments: Any, **options: Any) -> Any:
        assert not any(module.training for module in model.modules())  # no dropout
        calls.append(("generate", trained(model)))
        return generate(model, *arguments, **options)

    def recorded_score(config: Config, engine: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(("reference", trained(engine.policy.model)))
        return score(config, engine, *arguments, **options)

    def recorded_step(self: OnlineGroups, number: int) -> None:
        calls.append(("policy", trained(self.trainer.policy.model)))
        after_step(self, number)

    def interrupted_answer(self: NegativeMaker, wanted: list[tuple[int, int]], given: StopRequest | None) -> Any:
        stop.received = wanted[0][1] == stop_at
        return answer(self, wanted, given)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("bpo.train.load_encoder", letters_only))
        stack.enter_context(mock.patch.object(vision, "generate_prompts", recorded_generate))
        stack.enter_context(mock.patch.object(reference_pass, "score_groups", recorded_score))
        stack.enter_context(mock.patch.object(OnlineGroups, "after_step", recorded_step))
        stack.enter_context(mock.patch.object(NegativeMaker, "answer", interrupted_answer))
        finished = train(config, ranks, stop if stop_at else None)
    assert finished == (not stop_at)
    torch.save(calls, Path(config.train.output_dir) / "calls.pt")


def after_step_3(root: Path, name: str) -> None:
    """NAME-killed: as a kill after step 5 leaves a run, with the checkpoint of step 3 and files of later steps."""
    shutil.copytree(root / name, root / f"{name}-killed")
    shutil.rmtree(root / f"{name}-killed" / "checkpoints" / "step-00000006")
    (root / f"{name}-killed" / "online" / "reference-00000006").mkdir()


def one_rank(root: Path, ranks: Ranks) -> None:
    for every in (1, 2):
        run(config_of(root, f"every{every}", every=every), ranks)
        after_step_3(root, f"every{every}")
        run(config_of(root, f"every{every}-killed", every=every, resume=True), ranks)
    run(config_of(root, "stopped"), ranks, stop_at=5)
    run(config_of(root, "stopped", resume=True), ranks)
    run(config_of(root, "zero3", stage=3), ranks)
    run(config_of(root, "orpo", stage=2, loss="orpo", max_steps=2), ranks)
    held_out = config_of(root, "held_out", max_steps=2, held_out_groups=NUM_HELD_OUT, evaluate_every_steps=2)
    run(replace(held_out, data=replace(held_out.data, groups=str(root / "groups.jsonl"))), ranks)
    lose_an_image(root, ranks)
    followed(root, ranks)


def lose_an_image(root: Path, ranks: Ranks) -> None:
    """An image is deleted after the first step."""
    shutil.copytree(root / "images", root / "changing")
    config = config_of(root, "lost", every=2, save_every_steps=1, keep_last=1)
    config.data = replace(config.data, image_root=str(root / "changing"), max_bad_share=0.9)
    after_step = OnlineGroups.after_step

    def delete(self: OnlineGroups, number: int) -> None:
        (root / "changing" / "wide.png").unlink(missing_ok=True)
        after_step(self, number)

    with mock.patch.object(OnlineGroups, "after_step", delete):
        run(config, ranks)


def followed(root: Path, ranks: Ranks) -> None:
    """A follower is up to date after steps 1, 3, 5 and 6, in the middle of the use of a reference."""
    config, followers = config_of(root, "followed"), []
    config.online = replace(config.online, publish_reference=True)
    after_step = OnlineGroups.after_step

    def filling(self: OnlineGroups, number: int) -> None:
        after_step(self, number)
        published = published_reference(root / "followed")
        assert published is not None and published["step"] == number // 2 * 2
        with kept_random_state(self.trainer.device):  # in a process of its own it has another one
            followers[:] = followers or [Follower(root / "followed", self.trainer.device)]
            while number not in (2, 4) and followers[0].fill(published):
                pass

    with mock.patch.object(OnlineGroups, "after_step", filling):
        run(config, ranks)


def main() -> None:
    root = Path(sys.argv[1])
    load_model(config_of(root, "").model)  # imports what the rank needs
    fork_ranks(1, partial(one_rank, root))


if __name__ == "__main__":
    main()
