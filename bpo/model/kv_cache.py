"""Keys and values during generation: where they are kept, and prefixes that go through the model once.

Three kinds, an option of bootstrapping (`bootstrap.cache`):

- `reserved`: buffers with room to spare, appended to in place.
- `dynamic`: transformers' own growing cache. It copies all it holds for every new token: twice the bytes of memory
  traffic that attention itself causes.
- `static`: transformers' cache of one fixed size, for which it compiles decoding on CUDA. Attention reads all of it in
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

# A new buffer has room for an eighth more tokens, and for these at least: a byte is copied about nine times at most.
_ROOM_TOKENS = 64
# Below this a cached prefix saves less than its bookkeeping.
MIN_PREFIX_TOKENS = 16
_MAX_PREFIXES = 8


class _Buffer:
    """A tensor [B, H, T, D] whose first tokens are in use."""

    def __init__(self) -> None:
        self._room: torch.Tensor | None = None
        self._used: torch.Tensor | None = None

    def append(self, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """`torch.cat([held, new], dim=-2)`, in place where `held` came from here and there is room."""
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
    """An empty cache for `model` whose layers append in place; windowed and recurrent layers stay transformers' own."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [ReservedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """Tokens with which several prompts begin, and the keys and values a model computed for them once."""

    ids: tuple[int, ...]
    cache: DynamicCache

    def begins(self, prompt: Sequence[int]) -> bool:
        return len(prompt) > len(self.ids) and tuple(prompt[: len(self.ids)]) == self.ids

    def repeated(self, num_records: int) -> DynamicCache:
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(num_records)
        return cache


class Prefixes:
    """What prompts begin with (a system prompt, worked examples), each beginning computed once.

    Args:
        model: A transformers model.
        inputs_of_ids: What it needs beside token ids [1, T].
        enabled: False: there never is one.
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
        """The beginning `ids`; None where it is too short to be worth it, or the model's state cannot be handed on."""
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
    """The tokens with which all prompts begin, before the first `end_token_id`, and short of the whole of any."""
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
    """Runs a model over `ids` once; None where its state is no plain key-value cache (recurrent or windowed)."""
    ids_1T = torch.tensor([list(ids)], device=model.device)
    # By `generate`, which gives positions as the model wants them: Qwen-VL keeps an offset of its last batch.
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
