"""KV caches for generation, and prefixes whose keys and values are computed once.

Three kinds, selected by `bootstrap.cache`:

- `reserved`: over-allocated buffers, appended to in place.
- `dynamic`: transformers' own growing cache. It copies its whole content for every new token: twice the memory traffic
  of attention itself.
- `static`: transformers' fixed-size cache, for which it compiles decoding on CUDA. Attention reads the whole cache in
  every step, filled or not.

Shape letters: B records, H heads, T tokens, D head dimension.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# A new buffer has room for 1/8 more tokens, at least this many, so that a byte is copied about nine times at most.
_ROOM_TOKENS = 64
# A shorter cached prefix saves less than its bookkeeping costs.
MIN_PREFIX_TOKENS = 16
_MAX_PREFIXES = 8


class _Buffer:
    """An over-allocated tensor [B, H, T, D] whose first tokens are in use."""

    def __init__(self) -> None:
        self._room: torch.Tensor | None = None
        self._used: torch.Tensor | None = None

    def append(self, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """`torch.cat([held, new], dim=-2)`, in place if `held` is this buffer's last result and there is room."""
        start = held.shape[-2] if held.numel() else 0
        end = start + new.shape[-2]
        if self._room is None or held is not self._used or end > self._room.shape[-2]:
            room_tokens = end + max(_ROOM_TOKENS, end // 8)
            self._room = new.new_empty((*new.shape[:-2], room_tokens, new.shape[-1]))
            if start:
                self._room[..., :start, :] = held
        self._room[..., start:end, :] = new
        self._used = self._room[..., :end, :]
        return self._used


class ReservedLayer(DynamicLayer):
    """A layer of transformers' growing cache that appends in place."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._key_buffer, self._value_buffer = _Buffer(), _Buffer()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._key_buffer.append(self.keys, key_states)
        self.values = self._value_buffer.append(self.values, value_states)
        return self.keys, self.values


def reserved_cache(model: Any) -> DynamicCache:
    """An empty cache for `model` whose layers append in place; windowed and recurrent layers remain transformers'."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [ReservedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """Tokens with which several prompts start, and their keys and values."""

    ids: tuple[int, ...]
    cache: DynamicCache

    def begins(self, prompt: Sequence[int]) -> bool:
        return len(prompt) > len(self.ids) and tuple(prompt[: len(self.ids)]) == self.ids

    def repeated(self, num_records: int) -> DynamicCache:
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(num_records)
        return cache


class Prefixes:
    """An LRU cache of prompt prefixes (a system prompt, worked examples), each computed once.

    Args:
        model: A transformers model.
        inputs_of_ids: Its inputs in addition to token ids [1, T].
        enabled: If False, `of` always returns None.
    """

    def __init__(
        self,
        model: Any,
        inputs_of_ids: Callable[[torch.Tensor], dict[str, torch.Tensor]] = lambda ids_1T: {},
        enabled: bool = True,
    ):
        self._model, self._inputs_of_ids, self._enabled = model, inputs_of_ids, enabled
        self._known: OrderedDict[tuple[int, ...], CachedPrefix | None] = OrderedDict()

    def of(self, ids: Sequence[int]) -> CachedPrefix | None:
        """The cached prefix `ids`; None if it is too short to pay off, or the model's state cannot be reused."""
        if not self._enabled or len(ids) < MIN_PREFIX_TOKENS:
            return None
        key = tuple(ids)
        if key not in self._known:
            self._known[key] = cache_prefix(self._model, key, self._inputs_of_ids)
            if len(self._known) > _MAX_PREFIXES:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]


def common_beginning(prompts: Sequence[Sequence[int]], end_token_id: int | None = None) -> tuple[int, ...]:
    """The longest common prefix of all prompts, up to the first `end_token_id` and shorter than every prompt."""
    shared = []
    for tokens in zip(*(prompt[:-1] for prompt in prompts), strict=False):
        if tokens[0] == end_token_id or len(set(tokens)) > 1:
            break
        shared.append(tokens[0])
    return tuple(shared)


@torch.inference_mode()
def cache_prefix(
    model: Any, ids: Sequence[int], inputs_of_ids: Callable[[torch.Tensor], dict[str, torch.Tensor]]
) -> CachedPrefix | None:
    """Runs a model over `ids` once; None if its state is not a plain KV cache (recurrent or windowed layers)."""
    ids_1T = torch.tensor([list(ids)], device=model.device)
    # `generate` computes positions as the model requires: Qwen-VL stores an offset of its last batch.
    cache = model.generate(
        input_ids=ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        past_key_values=reserved_cache(model),
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        **inputs_of_ids(ids_1T),
    ).past_key_values
    plain = type(cache) is DynamicCache and all(type(layer) is ReservedLayer for layer in cache.layers)
    return CachedPrefix(tuple(ids), cache) if plain and cache.get_seq_length() == len(ids) else None
