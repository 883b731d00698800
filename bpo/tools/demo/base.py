"""The demo's base model: a tiny LLaVA with an accurate vision tower and a strong language prior.

The vision tower is trained first (`tower.py`). Projector and language model are then trained on captions and yes/no
answers about biased scenes only, from which the language model learns object co-occurrence. On scenes that contradict
this prior it names absent companions, although the tower's features show that they are absent.

Shapes: B conversations, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, cycle, repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import trange
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from .rewriting import rewriting_turn
from .sprites import NAMES, NUM_OBJECTS
from .tower import noised, pixels_of, train_tower
from .vocabulary import build_processor
from .world import DESCRIBE, Scene, WorldConfig, question_about, sample_scene

IGNORED = -100
YES, NO = "Yes.", "No."
CYCLE = ("caption", "questions", "caption", "rewriting", "caption")


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """Size and training of the demo's base model."""

    seed: int = 0
    """Seed of the initial weights and the questions; the scenes use the world's seed."""
    patch_px: int = 12
    """Side of a vision tower patch; image tokens = (image_px / patch_px)^2."""
    tower_width: int = 64
    tower_layers: int = 2
    tower_steps: int = 200
    tower_batch: int = 64
    tower_learning_rate: float = 3e-3
    noised_fraction: float = 0.3
    """Share of noised scenes in the tower's training, like bad photographs in the training data of real towers."""
    language_noised_fraction: float = 0.25
    """Share of noised scenes in the training of projector and language model. Their captions are complete, so the model
    learns to rely on its prior if the image shows little."""
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    steps: int = 820
    """Training steps of projector and language model: `question_fraction`, then the cycle of `CYCLE`."""
    question_fraction: float = 0.16
    """Share of steps at the start on questions only. Together with captions, questions are not learnt in as many steps:
    captions need no attention from a word to the patch that shows it."""
    batch: int = 32
    learning_rate: float = 1e-3
    questions_per_scene: int = 4
    """Yes/no questions per conversation, half of them about present objects."""

    def __post_init__(self) -> None:
        for field in ("patch_px", "tower_steps", "tower_batch", "steps", "batch", "questions_per_scene"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        for field in ("noised_fraction", "language_noised_fraction", "question_fraction"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise ValueError(f"{field} must be in [0, 1], got {getattr(self, field)}")


def build_base_model(directory: Path, world: WorldConfig, config: BaseConfig, *, progress: bool = True) -> None:
    """Trains the base model from scratch and saves it with its processor in `directory`.

    Load it with `AutoModelForImageTextToText` and `AutoProcessor`. Deterministic in the two seeds for a given number of
    threads.

    Raises:
        ValueError: The patch size does not divide the image size.
    """
    if world.image_px % config.patch_px:
        raise ValueError(f"patch_px={config.patch_px} does not divide image_px={world.image_px}; choose a divisor")
    processor = build_processor(world.image_px, config.patch_px)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        llava_config = _llava_config(world, config, processor)
        model = LlavaForConditionalGeneration(llava_config)
        _attend_to_equal_tokens(model)
        names = [f"\u2581{name}" for name in NAMES]
        train_tower(
            model.model.vision_tower,
            model.model.multi_modal_projector,
            model.get_input_embeddings().weight[processor.tokenizer.convert_tokens_to_ids(names)],
            world,
            num_steps=config.tower_steps,
            batch_size=config.tower_batch,
            learning_rate=config.tower_learning_rate,
            noised_fraction=config.noised_fraction,
            progress=progress,
        )
        _train_language(model, processor, world, config, progress=progress)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def _llava_config(world: WorldConfig, config: BaseConfig, processor: LlavaProcessor) -> LlavaConfig:
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=config.tower_width,
        intermediate_size=2 * config.tower_width,
        num_hidden_layers=config.tower_layers,
        num_attention_heads=4,
        image_size=world.image_px,
        patch_size=config.patch_px,
        projection_dim=config.tower_width,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.text_width,
        intermediate_size=3 * config.text_width,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_heads,
        num_key_value_heads=config.text_heads,
        max_position_embeddings=512,
        # 1 / sqrt(width): with the 0.02 of wide models, a narrow one needs twice the steps to learn to use the image.
        initializer_range=config.text_width**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=(world.image_px // config.patch_px) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


@torch.no_grad()
def _attend_to_equal_tokens(model: LlavaForConditionalGeneration) -> None:
    """Initialises the keys of the first layer as its queries: a token attends to those with a similar embedding.

    Pretrained language models have such heads (arXiv 2209.11895). A yes/no question needs one to match its word with a
    patch: neither alone tells the answer, so from independent weights the loss stays at that of a coin for as long as
    the demo trains.
    """
    attention = model.model.language_model.layers[0].self_attn
    attention.k_proj.weight.copy_(attention.q_proj.weight)


def _train_language(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    world: WorldConfig,
    config: BaseConfig,
    *,
    progress: bool,
) -> None:
    """Next-token training of projector and language model on the assistant's turns; the tower is frozen."""
    model.train()
    model.model.vision_tower.requires_grad_(False).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.steps, pct_start=0.04)
    bar = trange(config.steps, desc="training the base model", unit="step", disable=not progress)
    batches = _batches(processor, world, config)
    for _, batch in zip(bar, batches, strict=False):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def _batches(processor: LlavaProcessor, world: WorldConfig, config: BaseConfig) -> Iterator[dict[str, Tensor]]:
    """Endless batches, each of one kind, so that the sequences of a batch have similar lengths."""
    encode = _DialogueEncoder(processor, (world.image_px // config.patch_px) ** 2)
    rng = np.random.default_rng([config.seed, 1])
    generator = torch.Generator().manual_seed(config.seed)
    first = repeat("questions", round(config.question_fraction * config.steps))
    for step, kind in enumerate(chain(first, cycle(CYCLE))):
        scenes = [sample_scene(world, "base", step * config.batch + i) for i in range(config.batch)]
        if kind == "caption":
            dialogues = [[(DESCRIBE, scene.caption)] for scene in scenes]
        elif kind == "questions":
            dialogues = [_questions(scene, config.questions_per_scene, rng) for scene in scenes]
        else:
            dialogues = [[rewriting_turn(scene.objects, rng)] for scene in scenes]
        ids_BS, labels_BS = encode.batch(dialogues, with_image=kind != "rewriting")
        batch = {
            "input_ids": ids_BS,
            "attention_mask": (ids_BS != processor.tokenizer.pad_token_id).long(),
            "labels": labels_BS,
        }
        if kind != "rewriting":
            batch["pixel_values"] = noised(pixels_of(world, scenes), config.language_noised_fraction, generator)
        yield batch


def _questions(scene: Scene, count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions about present and absent objects with equal probability; few of the absent ones are companions."""
    absent = [i for i in range(NUM_OBJECTS) if i not in scene.objects]
    answers = [YES if rng.random() < 0.5 else NO for _ in range(count)]
    asked = [rng.choice(scene.objects if answer == YES else absent) for answer in answers]
    return [(question_about(NAMES[thing]), answer) for thing, answer in zip(asked, answers, strict=True)]


class _DialogueEncoder:
    """Encodes conversations about one image to token ids and labels with the processor's chat template."""

    def __init__(self, processor: LlavaProcessor, num_image_tokens: int) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.num_image_tokens = num_image_tokens
        self.prompt_ids = lru_cache(maxsize=None)(self._prompt_ids)
        self.answer_ids = lru_cache(maxsize=None)(self._answer_ids)

    def _prompt_ids(self, question: str, first: bool, with_image: bool) -> list[int]:
        text = {"type": "text", "text": question}
        content = [{"type": "image"}, text] if first and with_image else [text]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        if not first:
            prompt = prompt.removeprefix(self.tokenizer.bos_token)
        prompt = prompt.replace(self.processor.image_token, self.processor.image_token * self.num_image_tokens)
        return list(self.tokenizer(prompt, add_special_tokens=False).input_ids)

    def _answer_ids(self, answer: str) -> list[int]:
        return [*self.tokenizer(answer, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]

    def batch(
        self, dialogues: Sequence[Sequence[tuple[str, str]]], *, with_image: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(ids_BS, labels_BS), right-padded; only the assistant's tokens and EOS have labels."""
        ids, labels = [], []
        for turns in dialogues:
            row: list[int] = []
            label: list[int] = []
            for i, (question, answer) in enumerate(turns):
                prompt, reply = self.prompt_ids(question, i == 0, with_image), self.answer_ids(answer)
                row += prompt + reply
                label += [IGNORED] * len(prompt) + reply
            ids.append(torch.tensor(row))
            labels.append(torch.tensor(label))
        pad = nn.utils.rnn.pad_sequence
        ids_BS = pad(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return ids_BS, pad(labels, batch_first=True, padding_value=IGNORED)
