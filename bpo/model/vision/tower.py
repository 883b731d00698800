"""A frozen vision tower that runs apart from the rest of the model.

Features are what the projector modules take: the tower runs up to them, and a later forward pass starts with them.
Nothing of the model stays changed: modules are exchanged for the duration of a call only, under their own names.

Shape letters: K projector modules, R rows of an entry (an image or tile), D size of its features; a tile has R = 1 and
its tokens between R and D.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from bpo.data.families import Family
from bpo.data.useful_work import image_rows


class FrozenTower:
    """Runs the vision tower of a model without the projector, and the projector without the tower."""

    def __init__(self, model: Any, family: Family):
        self._model, self._family = model, family
        self._names: list[str] = []
        for name in family.projector_modules:  # a list of modules is not called itself
            module = model.get_submodule(name)
            is_list = isinstance(module, torch.nn.ModuleList)
            self._names += [f"{name}.{i}" for i in range(len(module))] if is_list else [name]

    @property
    def num_inputs(self) -> int:
        """K."""
        return len(self._names)

    @torch.no_grad()
    def encode(self, entries: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Features [K, R, ..., D] of each entry, from one call of the tower.

        Args:
            entries: `Family.entries` of any images, on the model's device.
        """
        taken: dict[int, torch.Tensor] = {}
        recorders = {name: _Recorder(taken, k, len(self._names)) for k, name in enumerate(self._names)}
        tower = self._model.get_submodule(self._family.vision_module)
        was_training = tower.training
        tower.eval()
        try:
            with _exchanged(self._model, recorders), contextlib.suppress(_ProjectorReached):
                self._family.run_tower(self._model, self._family.batch_image_inputs(entries))
        finally:
            tower.train(was_training)
        rows = [len(entry["pixel_values"]) for entry in entries]
        if any(len(taken.get(k, ())) != sum(rows) for k in range(len(self._names))):
            raise RuntimeError(
                f"the vision tower of {self._model.config.model_type} has no features of {sum(rows)} rows at "
                f"{', '.join(self._names)}: set vision.encode to micro_batch and vision.cache to none"
            )
        parts = zip(*(taken[k].split(rows) for k in range(len(self._names))), strict=True)
        return [torch.stack(of_entry) for of_entry in parts]  # copies: an entry does not keep the others in memory

    @contextlib.contextmanager
    def given(self, features: Sequence[torch.Tensor]) -> Iterator[None]:
        """Context in which the model, called with the pixels of these entries in order, does not run its tower."""
        if not features:
            yield
            return
        with contextlib.ExitStack() as stack:
            for k, name in enumerate(self._names):
                given = torch.cat([of_entry[k] for of_entry in features])
                hook = functools.partial(_give, given)
                module = self._model.get_submodule(name)
                # First, so that hooks of others, such as ZeRO-3's, see what the module gets.
                stack.callback(module.register_forward_pre_hook(hook, prepend=True).remove)
            stack.enter_context(_exchanged(self._model, self._stand_ins))
            yield

    @functools.cached_property
    def _stand_ins(self) -> dict[str, torch.nn.Module]:
        stand_ins: dict[str, torch.nn.Module] = {}
        for name in self._family.tower_modules:
            module = self._model.get_submodule(name)
            if name == self._family.vision_module:
                stand_ins[name] = _NoTower(self._model.config)
            elif isinstance(module, torch.nn.ModuleList):
                stand_ins[name] = torch.nn.ModuleList(_Same() for _ in module)
            else:
                stand_ins[name] = _NoPatches(self._model.config)
        return stand_ins


@contextlib.contextmanager
def _exchanged(model: torch.nn.Module, modules: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    """Puts modules in the places of others, past `Module.__setattr__` and ZeRO-3, which know nothing of them."""
    places: list[tuple[Any, str, torch.nn.Module | None]] = []
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        children = model.get_submodule(parent)._modules
        places.append((children, own, children[own]))
        children[own] = module
    try:
        yield
    finally:
        for children, own, original in places:
            children[own] = original


class _ProjectorReached(Exception):
    """All inputs of the projector are there; what follows need not run."""


class _Recorder(torch.nn.Module):
    """Stands for projector module number `k`, takes its input, and ends the call when all have theirs."""

    def __init__(self, taken: dict[int, torch.Tensor], k: int, count: int):
        super().__init__()
        self._taken, self._k, self._count = taken, k, count

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self._taken[self._k] = features
        if len(self._taken) == self._count:
            raise _ProjectorReached
        return features


def _give(features: torch.Tensor, module: torch.nn.Module, inputs: Any) -> tuple[torch.Tensor]:
    return (features,)


class _NoTower(torch.nn.Module):
    """Stands for a tower of tiles; has the shape of its output, which no one reads, without its memory."""

    def __init__(self, config: Any):
        super().__init__()
        self._config = config

    def forward(self, pixel_values: torch.Tensor, **options: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        tokens = image_rows({"pixel_values": pixel_values}, self._config).patches // len(pixel_values)
        size = self._config.vision_config.hidden_size
        hidden_FTD = pixel_values.new_zeros(()).expand(len(pixel_values), tokens, size)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_FTD, hidden_states=_EveryLayer(hidden_FTD))


class _EveryLayer:
    def __init__(self, hidden: torch.Tensor):
        self._hidden = hidden

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self._hidden


class _NoPatches(torch.nn.Module):
    """Stands for the patch embedding of a tower with the projector inside."""

    def __init__(self, config: Any):
        super().__init__()
        vision = config.vision_config
        self._size = getattr(vision, "embed_dim", None) or vision.hidden_size

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values.new_zeros(()).expand(len(pixel_values), self._size)


class _Same(torch.nn.Module):
    """Stands for a layer of such a tower."""

    def forward(self, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
        return hidden
