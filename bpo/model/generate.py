"""Answers from a model: one left-padded batch at a time, each record's answer a function of its own seed.

Shape letters: B records, T padded prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from bpo.config.bootstrap import CacheKind
from bpo.model.kv_cache import CachedPrefix, reserved_cache

if TYPE_CHECKING:
    from bpo.data.encode import EncodedPrompt, Encoder


# Batches of nearly one length then have one shape, and what transformers compiles for a static cache is used again.
_STATIC_MULTIPLE_TOKENS = 128


class GumbelNoise(LogitsProcessor):
    """Adds each record's own Gumbel noise to its scores, so that the greedy choice is an exact sample.

    argmax_v(scores_v + G_v) with G_v = -log E_v, E_v ~ Exp(1), follows softmax(scores). A generator a record, drawn
    once a token, makes the sample independent of the other records in the batch; HF's own sampling draws once for
    the whole batch.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise_BV = torch.empty_like(scores, dtype=torch.float32)
        for noise_V, generator in zip(noise_BV, self.generators, strict=True):
            noise_V.exponential_(generator=generator)
        tiny = torch.finfo(torch.float32).tiny  # log(0) would make any token win, a suppressed one too
        return scores - noise_BV.clamp_min_(tiny).log_()  # type: ignore[return-value]


class TokenBudgets(StoppingCriteria):
    """Ends each record at its own number of new tokens."""

    def __init__(self, prompt_length_tokens: int, budgets: Sequence[int], device: torch.device):
        self.prompt_length_tokens = prompt_length_tokens
        self.budgets_B = torch.tensor(budgets, device=device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        return input_ids.shape[1] - self.prompt_length_tokens >= self.budgets_B  # type: ignore[return-value]


def left_pad(
    sequences: Sequence[Sequence[int]], pad_token_id: int, multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T] that end together, and the mask [B, T], 0 on the padding; T is divisible by `multiple`."""
    length = max(len(ids) for ids in sequences)
    length += -length % multiple
    ids_BT = torch.full((len(sequences), length), pad_token_id, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, ids in enumerate(sequences):
        ids_BT[row, length - len(ids) :] = torch.tensor(ids, dtype=torch.long)
        mask_BT[row, length - len(ids) :] = 1
    return ids_BT, mask_BT


def _pad_after(
    prefix: CachedPrefix, prompts: Sequence[Sequence[int]], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`left_pad` with the padding between the common prefix and the rest of each prompt."""
    for prompt in prompts:
        if not prefix.begins(prompt):
            raise ValueError(f"a prompt of {len(prompt)} tokens does not begin with the {len(prefix.ids)} cached ones")
    rest_BT, mask_BT = left_pad([prompt[len(prefix.ids) :] for prompt in prompts], pad_token_id)
    prefix_BT = torch.tensor([prefix.ids]).expand(len(prompts), -1)
    return torch.cat([prefix_BT, rest_BT], dim=1), torch.cat([torch.ones_like(prefix_BT), mask_BT], dim=1)


def _padded(
    prompts: Sequence[Sequence[int]], pad_token_id: int, prefix: CachedPrefix | None, cache: CacheKind
) -> tuple[torch.Tensor, torch.Tensor]:
    if prefix is not None:
        return _pad_after(prefix, prompts, pad_token_id)
    return left_pad(prompts, pad_token_id, _STATIC_MULTIPLE_TOKENS if cache == "static" else 1)


@torch.inference_mode()
def generate_ids(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    eos_token_ids: Sequence[int],
    suppressed_token_ids: Sequence[int],
    max_new_tokens: Sequence[int],
    temperature: float,
    top_p: float,
    seeds: Sequence[int],
    model_inputs: dict[str, torch.Tensor] | None = None,
    inputs_of_ids: Callable[[torch.Tensor], dict[str, torch.Tensor]] = lambda ids_BT: {},
    prefix: CachedPrefix | None = None,
    cache: CacheKind = "reserved",
) -> list[tuple[list[int], bool]]:
    """Generates one batch.

    Args:
        model: A transformers model with `generate`, in eval mode.
        prompts: Token ids of B prompts.
        suppressed_token_ids: Tokens that never come out; none of them may be an EOS.
        max_new_tokens: Longest answer of each record.
        temperature: 0 is greedy; seeds then do not matter.
        top_p: Smallest set of tokens with this probability, after temperature.
        seeds: One a record.
        model_inputs: Further inputs, such as the images of the whole batch.
        inputs_of_ids: Gives those that go by the padded ids [B, T], such as token types.
        prefix: What all prompts begin with, computed before; padding then stands behind it. Not with a `static` cache.
        cache: Where keys and values are kept: see `bpo/model/kv_cache.py`.

    Returns:
        For each record its new tokens without EOS, and whether it ended by EOS (not by its budget).
    """
    if not len(prompts) == len(seeds) == len(max_new_tokens):
        raise ValueError(
            f"{len(prompts)} prompts, {len(seeds)} seeds and {len(max_new_tokens)} budgets; give one of each a record"
        )
    ids_BT, mask_BT = _padded(prompts, pad_token_id, prefix, cache)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max(max_new_tokens),
        eos_token_id=list(eos_token_ids),
        pad_token_id=pad_token_id,
        use_cache=True,
        cache_implementation="static" if cache == "static" else None,
    )
    with _own_settings_aside(model, config):
        output_BT = model.generate(
            input_ids=ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            generation_config=config,
            logits_processor=_processors(suppressed_token_ids, temperature, top_p, seeds, model.device),
            stopping_criteria=StoppingCriteriaList([TokenBudgets(ids_BT.shape[1], max_new_tokens, model.device)]),
            **_cache_arguments(model, cache, prefix, len(prompts)),
            **_to_model((model_inputs or {}) | inputs_of_ids(ids_BT), model),
        )
    new_ids = zip(output_BT[:, ids_BT.shape[1] :].tolist(), max_new_tokens, strict=True)
    return [_until_end(ids, set(eos_token_ids), budget) for ids, budget in new_ids]


@contextmanager
def _own_settings_aside(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Generates by `config` alone.

    transformers fills what a config leaves open from the model's own: Qwen2.5-VL asks for a repetition penalty there,
    which would change the distribution that is sampled.
    """
    own_config, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own_config


def _cache_arguments(model: Any, cache: CacheKind, prefix: CachedPrefix | None, num_records: int) -> dict[str, Any]:
    if prefix is not None:
        assert cache != "static", "a prefix cannot be put in front of transformers' static cache"
        return {"past_key_values": prefix.repeated(num_records)}
    return {"past_key_values": reserved_cache(model)} if cache == "reserved" else {}


def _processors(
    suppressed_token_ids: Sequence[int], temperature: float, top_p: float, seeds: Sequence[int], device: torch.device
) -> LogitsProcessorList:
    """What stands between the model's scores and the greedy choice, in order."""
    processors = LogitsProcessorList()
    if suppressed_token_ids:
        processors.append(SuppressTokensLogitsProcessor(suppressed_token_ids, device=device))
    if temperature > 0:
        processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        processors.append(GumbelNoise(seeds, device))
    return processors


def _until_end(ids: list[int], eos_token_ids: set[int], budget: int) -> tuple[list[int], bool]:
    for index, token in enumerate(ids[:budget]):
        if token in eos_token_ids:
            return ids[:index], True
    return ids[:budget], False


def _to_model(inputs: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def generate_prompts(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[EncodedPrompt],
    *,
    max_new_tokens: Sequence[int],
    temperature: float,
    top_p: float,
    seeds: Sequence[int],
    beginnings: Sequence[Sequence[int]] | None = None,
    prefix: CachedPrefix | None = None,
    cache: CacheKind = "reserved",
) -> list[tuple[str, bool]]:
    """`generate_answers` with a budget a record; also tells which answers ended by themselves.

    Args:
        beginnings: Tokens of each answer that its prompt ends with already; the answer holds them.
        prefix, cache: See `generate_ids`.
    """
    if not prompts:
        return []
    images = encoder.family.batch_image_inputs([p.image_inputs for p in prompts if p.image_inputs])
    answers = generate_ids(
        model,
        [prompt.prefix_ids for prompt in prompts],
        pad_token_id=encoder.pad_token_id,
        eos_token_ids=encoder.end_token_ids,
        suppressed_token_ids=encoder.suppressed_token_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seeds=seeds,
        model_inputs=images,
        inputs_of_ids=encoder.family.generation_inputs,
        prefix=prefix,
        cache=cache,
    )
    begun = beginnings or [()] * len(prompts)
    return [(encoder.decode([*first, *ids]), ended) for first, (ids, ended) in zip(begun, answers, strict=True)]


def generate_answers(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[EncodedPrompt],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seeds: Sequence[int],
) -> list[str]:
    """The model's answers to one batch of prompts, control and placeholder tokens suppressed.

    An answer depends on its prompt, its seed and the sampling options alone: not on the batch it is in, but for the
    rounding of batched matrix products (a rare token in bf16 when the batch's shape changes; none seen in fp32).

    Args:
        model: From `bpo.model.load.load_model`, in eval mode.
        prompts: At most as many as fit in memory together; they are padded on the left to the longest.
        max_new_tokens: Longest answer.
        temperature: 0 is greedy.
        top_p: Nucleus, 1 keeps all tokens.
        seeds: One a prompt.
    """
    budgets = [max_new_tokens] * len(prompts)
    sampled = generate_prompts(
        model, encoder, prompts, max_new_tokens=budgets, temperature=temperature, top_p=top_p, seeds=seeds
    )
    return [text for text, _ in sampled]
