"""Batched generation: one left-padded batch at a time, sampled with a seed per record.

Shape letters: B records, T padded prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bpo.config.bootstrap import CacheKind
from bpo.model.kv_cache import CachedPrefix, reserved_cache

if TYPE_CHECKING:
    from bpo.data.encode import EncodedPrompt, Encoder

Join = Callable[[Sequence[int], bool], Sequence[int]]

# Rounds lengths up, so that batches share few shapes and transformers reuses its compilations for a static cache.
_STATIC_MULTIPLE_TOKENS = 128


class GumbelNoise(LogitsProcessor):
    """Adds per-record Gumbel noise to the scores, so that the greedy choice is an exact sample.

    argmax_v(scores_v + G_v) with G_v = -log E_v, E_v ~ Exp(1), follows softmax(scores). One generator per record, drawn
    from once per token, makes the sample independent of the other records in the batch; HF's own sampling uses one
    generator for the whole batch.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise_BV = torch.empty_like(scores, dtype=torch.float32)
        for noise_V, generator in zip(noise_BV, self.generators, strict=True):
            noise_V.exponential_(generator=generator)
        tiny = torch.finfo(torch.float32).tiny  # log(0) would make any token win, even a suppressed one
        return scores - noise_BV.clamp_min_(tiny).log_()  # type: ignore[return-value]


class TokenBudgets(StoppingCriteria):
    """Stops each record at its own number of new tokens."""

    def __init__(self, prompt_length_tokens: int, budgets: Sequence[int], device: torch.device):
        self.prompt_length_tokens = prompt_length_tokens
        self.budgets_B = torch.tensor(budgets, device=device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        return input_ids.shape[1] - self.prompt_length_tokens >= self.budgets_B  # type: ignore[return-value]


def left_pad(
    sequences: Sequence[Sequence[int]], pad_token_id: int, multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-aligned token ids [B, T], and the mask [B, T], 0 on the padding; T is divisible by `multiple`."""
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
            raise ValueError(f"a prompt of {len(prompt)} tokens does not start with the {len(prefix.ids)} cached ones")
    rest_BT, mask_BT = left_pad([prompt[len(prefix.ids) :] for prompt in prompts], pad_token_id)
    prefix_BT = torch.tensor([prefix.ids]).expand(len(prompts), -1)
    return torch.cat([prefix_BT, rest_BT], dim=1), torch.cat([torch.ones_like(prefix_BT), mask_BT], dim=1)


def _padded(
    prompts: Sequence[Sequence[int]], pad_token_id: int, prefix: CachedPrefix | None, cache: CacheKind
) -> tuple[torch.Tensor, torch.Tensor]:
    if prefix is not None:
        return _pad_after(prefix, prompts, pad_token_id)
    return left_pad(prompts, pad_token_id, _STATIC_MULTIPLE_TOKENS if cache == "static" else 1)


def without_gradients(model: Any) -> AbstractContextManager[Any]:
    """Inference mode; `no_grad` for a model in training, as ZeRO-3 could not train weights gathered in that mode."""
    in_training = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return torch.no_grad() if in_training else torch.inference_mode()


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
    top_k: int = 0,
    num_beams: int = 1,
    beam_inputs: dict[str, torch.Tensor] | None = None,
) -> list[tuple[list[int], bool]]:
    """Generates one batch.

    Args:
        model: A transformers model with `generate`, in eval mode.
        prompts: Token ids of B prompts.
        suppressed_token_ids: Tokens that are never generated; must not include an EOS.
        max_new_tokens: Longest answer of each record.
        temperature: 0 is greedy; seeds are then ignored.
        top_p: Smallest set of tokens with this probability, after temperature.
        seeds: One per record.
        model_inputs: Further inputs, such as the images of the whole batch.
        inputs_of_ids: Computes inputs that depend on the padded ids [B, T], such as token types.
        prefix: Cached common prefix of all prompts; padding then follows it. Not supported by a `static` cache.
        cache: The kind of KV cache: see `bpo/model/kv_cache.py`.
        top_k: Number of most probable tokens; 0 keeps all.
        num_beams: Beams of a beam search; above 1 all budgets must be equal, temperature 0 and cache dynamic.
        beam_inputs: `model_inputs` with those of each record repeated `num_beams` times.

    Returns:
        For each record its new tokens without EOS, and whether it ended with EOS (not at its budget).
    """
    if not len(prompts) == len(seeds) == len(max_new_tokens):
        raise ValueError(
            f"{len(prompts)} prompts, {len(seeds)} seeds and {len(max_new_tokens)} budgets; pass one each per record"
        )
    ids_BT, mask_BT = _padded(prompts, pad_token_id, prefix, cache)
    config = _config(cache, pad_token_id, eos_token_ids, num_beams, max(max_new_tokens))
    expanding = _expanding(model, model_inputs or {}, beam_inputs or {})
    with without_gradients(model), _generation_config(model, config), expanding:
        output_BT = model.generate(
            input_ids=ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            generation_config=config,
            logits_processor=logits_processors(suppressed_token_ids, temperature, top_p, top_k, seeds, model.device),
            stopping_criteria=_budgets(ids_BT.shape[1], max_new_tokens, num_beams, model.device),
            **_cache_arguments(model, cache, prefix, len(prompts)),
            **to_model((model_inputs or {}) | inputs_of_ids(ids_BT), model),
        )
    new_ids = zip(output_BT[:, ids_BT.shape[1] :].tolist(), max_new_tokens, strict=True)
    return [until_end(ids, set(eos_token_ids), budget) for ids, budget in new_ids]


def _config(
    cache: CacheKind, pad_token_id: int, eos_token_ids: Sequence[int], num_beams: int, max_new_tokens: int
) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_token_ids),
        pad_token_id=pad_token_id,
        use_cache=True,
        cache_implementation="static" if cache == "static" else None,
    )


@contextmanager
def _generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Replaces the model's generation config by `config`.

    transformers fills unset options from the model's own config. That of Qwen2.5-VL has a repetition penalty, which
    would change the sampled distribution.
    """
    own_config, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own_config


@contextmanager
def _expanding(model: Any, inputs: dict[str, torch.Tensor], beam_inputs: dict[str, torch.Tensor]) -> Iterator[None]:
    """Passes `beam_inputs` to the beams instead of `inputs`.

    transformers repeats the rows of every input, which is wrong for images: a record has none, one or several rows.
    Later versions (5.23) encode images before and repeat their features, but assign those of Idefics3 to other records.
    """
    if not beam_inputs:
        yield
        return
    expand = model._expand_inputs_for_generation

    def expand_others(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        others = {name: value for name, value in kwargs.items() if name not in {*inputs, "mm_encoder_outputs"}}
        ids_BT, expanded = expand(*args, **others)
        return ids_BT, expanded | to_model(beam_inputs, model)

    model._expand_inputs_for_generation = expand_others
    try:
        yield
    finally:
        del model._expand_inputs_for_generation  # the method of the class again


def _budgets(
    prompt_length_tokens: int, max_new_tokens: Sequence[int], num_beams: int, device: torch.device
) -> StoppingCriteriaList:
    if num_beams == 1:
        return StoppingCriteriaList([TokenBudgets(prompt_length_tokens, max_new_tokens, device)])
    assert len(set(max_new_tokens)) == 1, "a beam search has one budget, which its generation config holds"
    return StoppingCriteriaList()


def _cache_arguments(model: Any, cache: CacheKind, prefix: CachedPrefix | None, num_records: int) -> dict[str, Any]:
    if prefix is not None:
        assert cache != "static", "transformers' static cache cannot start from a cached prefix"
        return {"past_key_values": prefix.repeated(num_records)}
    return {"past_key_values": reserved_cache(model)} if cache == "reserved" else {}


def logits_processors(
    suppressed_token_ids: Sequence[int],
    temperature: float,
    top_p: float,
    top_k: int,
    seeds: Sequence[int],
    device: torch.device,
) -> LogitsProcessorList:
    """Logits processors applied before argmax, in order."""
    processors = LogitsProcessorList()
    if suppressed_token_ids:
        processors.append(SuppressTokensLogitsProcessor(suppressed_token_ids, device=device))
    if temperature > 0:
        processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            processors.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            processors.append(TopPLogitsWarper(top_p))
        processors.append(GumbelNoise(seeds, device))
    return processors


def until_end(ids: list[int], eos_token_ids: set[int], budget: int) -> tuple[list[int], bool]:
    """The tokens before the first EOS, at most `budget`, and whether there is an EOS."""
    for index, token in enumerate(ids[:budget]):
        if token in eos_token_ids:
            return ids[:index], True
    return ids[:budget], False


def to_model(inputs: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """The inputs on the model's device, floating-point ones in its dtype."""
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
    joins: Sequence[Join] | None = None,
    prefix: CachedPrefix | None = None,
    cache: CacheKind = "reserved",
    top_k: int = 0,
    num_beams: int = 1,
) -> list[tuple[str, bool]]:
    """`generate_answers` with a budget per record; also returns whether each answer ended with EOS.

    Args:
        joins: For each record, makes its answer of the new tokens and of whether they ended with EOS, such as one that
            begins with the last tokens of the prompt; by default the new tokens are the answer.
        prefix, cache, top_k, num_beams: See `generate_ids`.
    """
    if not prompts:
        return []
    images = [prompt.image_inputs for prompt in prompts if prompt.image_inputs]
    of_beams = [inputs for inputs in images for _ in range(num_beams)] if num_beams > 1 else []
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
        model_inputs=encoder.family.batch_image_inputs(images),
        inputs_of_ids=encoder.family.generation_inputs,
        prefix=prefix,
        cache=cache,
        top_k=top_k,
        num_beams=num_beams,
        beam_inputs=encoder.family.batch_image_inputs(of_beams),
    )
    if joins is None:
        return [(encoder.decode(ids), ended) for ids, ended in answers]
    return [(encoder.decode(join(ids, ended)), ended) for join, (ids, ended) in zip(joins, answers, strict=True)]


def generate_answers(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[EncodedPrompt],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seeds: Sequence[int],
    top_k: int = 0,
    num_beams: int = 1,
) -> list[str]:
    """The model's answers to one batch of prompts, control and placeholder tokens suppressed.

    An answer depends only on its prompt, its seed and the sampling options, not on the rest of the batch, except for
    the rounding of batched matrix products (rarely a token in bf16 if the batch's shape changes; never seen in fp32).

    Args:
        model: From `bpo.model.load.load_model`, in eval mode.
        prompts: One batch, which must fit in memory; padded on the left to the longest.
        max_new_tokens: Longest answer.
        temperature: 0 is greedy.
        top_p: Nucleus; 1 keeps all tokens.
        seeds: One per prompt.
        top_k: Number of most probable tokens; 0 keeps all.
        num_beams: Beams of a beam search, with temperature 0; 1 is greedy.
    """
    sampled = generate_prompts(
        model,
        encoder,
        prompts,
        max_new_tokens=[max_new_tokens] * len(prompts),
        temperature=temperature,
        top_p=top_p,
        seeds=seeds,
        # Beams change places in the cache after every token, which would copy reserved buffers.
        cache="dynamic" if num_beams > 1 else "reserved",
        top_k=top_k,
        num_beams=num_beams,
    )
    return [text for text, _ in sampled]
