"""The model `bpo` of lmms-eval: any supported model, with a PEFT adapter or a checkpoint, on lmms-eval's tasks.

    python -m lmms_eval --model bpo --model_args pretrained=BASE,adapter=ADAPTER --tasks pope --batch_size 16

lmms-eval finds it by the entry point `lmms_eval.models`. It is a chat model: messages go through the chat template of
`bpo`'s own encoder, and answers come from `bpo`'s own generation, as in training and in `bpo evaluate`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from bpo.checkpoint.inference import load_checkpoint
from bpo.config.adapter import split_adapter
from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.data.encode import EncodedPrompt, load_encoder
from bpo.formats.images import decode_image
from bpo.job.launch import pick_device
from bpo.job.seeds import derive_seed
from bpo.model.generate import generate_answers
from bpo.model.inference import load_for_inference
from bpo.records import ContentPart, Turn

MODEL_ID = "bpo"
_DEFAULT_NEW_TOKENS = 1024
_HAS_LMMS_EVAL = importlib.util.find_spec("lmms_eval") is not None
# Without lmms-eval this module can be imported, such as by tests, but not used.
_Base: Any = importlib.import_module("lmms_eval.api.model").lmms if _HAS_LMMS_EVAL else object


def manifest() -> Any:
    """What the entry point registers."""
    registry = importlib.import_module("lmms_eval.models.registry_v2")
    return registry.ModelManifest(model_id=MODEL_ID, chat_class_path=f"{__name__}.BpoLmms")


@dataclass(frozen=True, slots=True)
class Decoding:
    """`generation_kwargs` of a task, as far as generation knows them.

    `until` is not among them: where a task has none, lmms-eval sets it to the few-shot delimiter, an empty line, which
    would cut descriptions after the first paragraph. lmms-eval's own chat models ignore it, too.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    num_beams: int

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> Decoding:
        temperature = float(kwargs.get("temperature") or 0)
        return cls(
            max_new_tokens=int(kwargs.get("max_new_tokens") or _DEFAULT_NEW_TOKENS),
            temperature=temperature if kwargs.get("do_sample", temperature > 0) else 0.0,
            top_p=float(kwargs.get("top_p") or 1),
            top_k=int(kwargs.get("top_k") or 0),
            num_beams=int(kwargs.get("num_beams") or 1),
        )


class BpoLmms(_Base):  # type: ignore[misc]
    """A model for lmms-eval.

    Args:
        pretrained: Model directory, merged export, or PEFT adapter that names its base.
        adapter: Directory of a PEFT adapter for `pretrained`.
        checkpoint: Checkpoint or run directory that was trained from `pretrained`.
        batch_size: Answers generated at once.
        device: Device, such as cuda:0; empty uses this rank's GPU, or the CPU.
        dtype: As `model.dtype`; a checkpoint has its own.
        min_pixels, max_pixels, image_aspect, system_prompt: As in `data.*`.
        trust_remote_code: As in `model.*`.

    Raises:
        ImportError: lmms-eval is not installed.
        ValueError: A file is missing or damaged, or both `adapter` and `checkpoint` are given.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        adapter: str = "",
        checkpoint: str = "",
        batch_size: int | str = 1,
        device: str = "",
        dtype: str = "bfloat16",
        min_pixels: int = 0,
        max_pixels: int = 0,
        image_aspect: str = "processor",
        system_prompt: str = "",
        trust_remote_code: bool = False,
    ):
        if not _HAS_LMMS_EVAL:
            raise ImportError("lmms-eval is not installed; pip install 'bpo[lmms-eval]'")
        super().__init__()
        if adapter and checkpoint:
            raise ValueError(f"model_args: give adapter={adapter} or checkpoint={checkpoint}, not both")
        self.batch_size = int(batch_size)
        self.device = torch.device(device) if device else pick_device()
        options, own_adapter = split_adapter(
            ModelConfig(path=pretrained, dtype=dtype, trust_remote_code=trust_remote_code)  # type: ignore[arg-type]
        )
        data = DataConfig(
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            image_aspect=image_aspect,  # type: ignore[arg-type]
            system_prompt=system_prompt,
        )
        self.encoder = load_encoder(Config(model=options, data=data))
        if checkpoint:
            self.model = load_checkpoint(options, Path(checkpoint), self.device)
        else:
            self.model = load_for_inference(options, adapter or own_adapter, self.device)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer per request, in order; requests with equal decoding are batched."""
        answers: dict[int, str] = {}
        by_decoding: dict[Decoding, list[int]] = {}
        for number, request in enumerate(requests):
            by_decoding.setdefault(Decoding.of(request.args[2]), []).append(number)
        with tqdm(total=len(requests), desc="answering", unit="answer", disable=self.rank != 0) as bar:
            for decoding, numbers in by_decoding.items():
                for start in range(0, len(numbers), self.batch_size):
                    batch = numbers[start : start + self.batch_size]
                    answers |= zip(batch, self._answer([requests[n] for n in batch], decoding), strict=True)
                    bar.update(len(batch))
        return [answers[number] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("lmms-eval asks chat models for text only; choose tasks of type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("the model bpo answers single questions; choose tasks of type generate_until")

    def _answer(self, requests: Sequence[Any], decoding: Decoding) -> list[str]:
        texts = generate_answers(
            self.model,
            self.encoder,
            [self._encode(request) for request in requests],
            max_new_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k,
            num_beams=decoding.num_beams,
            seeds=[derive_seed(0, str(request.args[4]), str(request.args[3])) for request in requests],
        )
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", (request.args[0], request.args[2]), text)
        return texts

    def _encode(self, request: Any) -> EncodedPrompt:
        _, doc_to_messages, _, doc_id, task, split = request.args
        name = f"{task}/{split}/{doc_id}"
        turns, pictures = turns_of(doc_to_messages(self.task_dict[task][split][doc_id]), name)
        images = self.encoder.encode_pictures(pictures, [f"{name}, image {n}" for n in range(len(pictures))])
        return self.encoder.encode_prompt(name, images, turns)


def turns_of(messages: Sequence[Mapping[str, Any]], name: str) -> tuple[list[Turn], list[Image.Image]]:
    """The turns of lmms-eval's messages, and their images in order.

    Args:
        name: Of the record, for messages.

    Raises:
        ValueError: A message has video or audio.
    """
    turns, pictures = [], []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                pictures.append(_picture(part["url"], name))
                parts.append(ContentPart("image"))
            elif part["type"] == "text":
                parts.append(ContentPart("text", part["text"]))
            else:
                raise ValueError(f"{name}: a message has {part['type']}; choose tasks with images and text only")
        turns.append(Turn(message["role"], tuple(parts)))
    return turns, pictures


def _picture(image: Any, name: str) -> Image.Image:
    return image.convert("RGB") if isinstance(image, Image.Image) else decode_image(Path(image), name)
