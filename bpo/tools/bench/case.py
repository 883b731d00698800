"""The benchmark case of `bpo bench step`: the pairs, weights and adapter that all providers use."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bpo.config.training import Config, DataConfig, LoraConfig, LossConfig, ModelConfig, TrainableConfig, TrainConfig
from bpo.data.cells import preference_pairs
from bpo.data.encode import Dropped, Encoder, load_encoder
from bpo.data.groups import GroupDataset
from bpo.formats.files import group_to_json, read_groups
from bpo.records import Completion, PreferenceGroup

# Standard deviation of the adapter's B. Training starts with B = 0, but then policy equals reference, every loss is
# log 2, and comparing losses would be meaningless.
ADAPTER_B_STD = 0.02


@dataclass(frozen=True)
class PairRow:
    """One pair as text for TRL: the rendered prompt with an image placeholder, both answers with EOS."""

    label: str
    prompt: str
    chosen: str
    rejected: str
    images: tuple[str, ...]


@dataclass(frozen=True)
class StepCase:
    """One optimizer step: its groups, as packed groups for bpo and as rows for TRL, and its hyperparameters.

    Attributes:
        model: Model directory.
        groups: JSONL of exactly the groups of the step, without unused completions.
        rows: All pairs (i, j) with score_i > score_j in these groups.
        num_tokens: Tokens of the packed groups: the size of bpo's single micro-batch.
        workdir: Folder for the providers' files.
    """

    model: str
    groups: str
    image_root: str
    rows: tuple[PairRow, ...]
    num_groups: int
    num_tokens: int
    workdir: str
    dtype: str
    lora_rank: int
    beta: float
    lr: float
    gradient_checkpointing: str
    max_length_tokens: int

    @property
    def num_pairs(self) -> int:
        return len(self.rows)

    def config(self, micro_batches: int = 1, dropout: float = 0.0) -> Config:
        """The training configuration: all groups in one step; only LoRA is trained.

        Args:
            micro_batches: Their number, if all groups have the same length.
            dropout: Of the adapter.
        """
        groups = math.ceil(self.num_groups / micro_batches)
        return Config(
            model=ModelConfig(
                path=self.model,
                dtype=self.dtype,  # type: ignore[arg-type]
                gradient_checkpointing=self.gradient_checkpointing,  # type: ignore[arg-type]
            ),
            data=DataConfig(
                groups=self.groups,
                image_root=self.image_root,
                max_length_tokens=self.max_length_tokens,
                keep_lengths=False,
                num_workers=0,
            ),
            # alpha / r as in the paper; providers run without dropout, which would draw differently on either side.
            lora=LoraConfig(r=self.lora_rank, alpha=8.0 * self.lora_rank, dropout=dropout),
            trainable=TrainableConfig(language="lora", projector="frozen", vision="frozen"),
            loss=LossConfig(type="sigmoid", beta=self.beta),
            train=TrainConfig(
                output_dir=str(Path(self.workdir) / "bpo"),
                epochs=1,
                groups_per_step=self.num_groups,
                max_micro_batch_tokens=math.ceil(self.num_tokens * groups / self.num_groups),
                lr=self.lr,
                lr_schedule="constant",
                warmup_ratio=0.0,
                tensorboard=False,
            ),
        )


def pair_label(group: int, chosen: int, rejected: int) -> str:
    """Label of a pair: the group's index in the file and the indices of its completions."""
    return f"{group}:{chosen}>{rejected}"


def build_case(
    model: Path, groups: Path, image_root: Path, num_groups: int, workdir: Path, **settings: Any
) -> StepCase:
    """Builds a step from the first `num_groups` usable groups of a file.

    Args:
        settings: The remaining fields of `StepCase`.

    Raises:
        ValueError: The file has fewer usable groups; the message explains the first unusable one.
    """
    case = StepCase(
        model=str(model),
        groups=str(groups),
        image_root=str(image_root),
        rows=(),
        num_groups=num_groups,
        num_tokens=1,
        workdir="",
        **settings,
    )
    encoder = load_encoder(case.config())
    dataset = GroupDataset(read_groups(groups), encoder, max_words=case.config().data.max_completion_words, types=())
    usable: list[PreferenceGroup] = []
    refused: list[Dropped] = []
    rows: list[PairRow] = []
    num_tokens = 0
    for index, group in enumerate(dataset.groups):
        if len(usable) == num_groups:
            break
        encoded = dataset.encode(index)
        if isinstance(encoded, Dropped):
            refused.append(encoded)
            continue
        group = replace(group, completions=_distinct(group, encoder))
        num_tokens += encoded.num_tokens
        rows += _rows(len(usable), group, encoder, image_root)
        usable.append(group)
    if len(usable) < num_groups:
        why = f"; {refused[0].group_id}: {refused[0].detail}" if refused else ""
        raise ValueError(f"{groups}: {len(usable)} usable groups, but --num-groups is {num_groups}{why}")
    workdir.mkdir(parents=True, exist_ok=True)
    chosen = workdir / "groups.jsonl"
    lines = [json.dumps({**group_to_json(group), "id": str(i)}) for i, group in enumerate(usable)]
    chosen.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return replace(case, groups=str(chosen), rows=tuple(rows), num_tokens=num_tokens, workdir=str(workdir))


def _distinct(group: PreferenceGroup, encoder: Encoder) -> tuple[Completion, ...]:
    """Merges completions with equal tokens and keeps the higher score, as the encoder does; TRL has no weights."""
    best: dict[tuple[int, ...], Completion] = {}
    for completion in group.completions:
        ids = encoder.encode_completion(completion.response)
        if ids not in best or completion.score > best[ids].score:
            best[ids] = replace(completion, weight=1.0)
    return tuple(best.values())


def _rows(number: int, group: PreferenceGroup, encoder: Encoder, image_root: Path) -> list[PairRow]:
    messages: list[dict[str, Any]] = [
        {
            "role": turn.role,
            "content": [{"type": p.type, **({"text": p.text} if p.type == "text" else {})} for p in turn.content],
        }
        for turn in group.prompt
    ]
    prompt = encoder.processor.apply_chat_template(messages)
    tokenizer = encoder.tokenizer
    bos = tokenizer.bos_token
    # TRL adds no special tokens to multimodal prompts; bpo adds BOS if the template does not.
    if bos and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] and not prompt.startswith(bos):
        prompt = bos + prompt
    end = tokenizer.convert_ids_to_tokens(encoder.eos_token_id)
    images = tuple(str(image_root / image) for image in group.images)
    answers = [completion.response + end for completion in group.completions]
    return [
        PairRow(pair_label(number, i, j), prompt, answers[i], answers[j], images)
        for i, j in preference_pairs([completion.score for completion in group.completions])
    ]


@torch.no_grad()
def set_adapter(model: torch.nn.Module, dtype: torch.dtype) -> str:
    """Sets every LoRA matrix of `model` to random values seeded by its name; returns their SHA-256.

    Any two models get the same adapter: A as PEFT initialises it, uniform in +-1 / sqrt(inputs), and B normal with
    `ADAPTER_B_STD`, rounded to `dtype`.

    Raises:
        ValueError: The model has no adapter.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(_lora_parameters(model)):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if "lora_A" in name:
            value = (torch.rand(parameter.shape, generator=generator) * 2 - 1) / math.sqrt(parameter.shape[1])
        else:
            value = ADAPTER_B_STD * torch.randn(parameter.shape, generator=generator)
        value = value.to(dtype)
        parameter.copy_(value)
        digest.update(name.encode() + value.float().numpy().tobytes())
    if digest.digest() == hashlib.sha256().digest():
        raise ValueError("the model has no LoRA adapter to set")
    return digest.hexdigest()


def _lora_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """LoRA parameters by their names without the PEFT wrapper."""
    named = [(name.removeprefix("base_model.model."), p) for name, p in model.named_parameters() if "lora_" in name]
    return sorted(named, key=lambda pair: pair[0])
