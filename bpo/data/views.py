"""Views: changed images of a group under which its completions are scored (`loss.views`).

A view depends on the seed, the record and its options alone, so that policy and reference, all ranks and all epochs see
the same one. Two names with equal options are the same view.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace

import torch
from PIL import Image

from bpo.config.loss import ViewConfig
from bpo.data.encode import EncodedImages, EncodedPrompt, Encoder, EncodingError
from bpo.data.noise import diffuse_images
from bpo.data.padding import pad_to_square
from bpo.data.pictures import crop_picture, mask_picture, masked_cells, noise_picture, normalisation
from bpo.job.seeds import derive_seed
from bpo.records import ContentPart, PreferenceGroup, Turn

PictureView = Callable[[Image.Image, ViewConfig, torch.Generator], Image.Image]

# The options that each type reads; those with none are not random.
_READS = {"noise": ("step", "space"), "crop": ("min_area", "max_area"), "mask": ("share",), "other": (), "none": ()}
_PLUGIN_VIEWS: dict[str, PictureView] = {}


def register_view(name: str) -> Callable[[PictureView], PictureView]:
    """Registers a function from an RGB picture to the changed RGB picture under its `loss.views.NAME.type` name.

    The function also receives the view's options and a generator, from which all its random draws must come. It is
    called for each image of a group in order, with the same generator. The picture is its own to change.

    Raises:
        ValueError: The name is taken.
    """

    def add(function: PictureView) -> PictureView:
        if name in _READS or name in _PLUGIN_VIEWS:
            raise ValueError(f"a view type named {name!r} is already registered")
        _PLUGIN_VIEWS[name] = function
        return function

    return add


def check_views(views: Mapping[str, ViewConfig]) -> None:
    """Checks what does not depend on the model; plug-ins must have been loaded.

    Raises:
        ValueError: A name is empty, a type unknown, or options contradict each other; names loss.views.NAME.
    """
    for name, view in views.items():
        where = f"loss.views.{name}"
        if not name.strip():
            raise ValueError("loss.views has a view without a name; give it one: the empty name is the clean image")
        if view.type not in _READS and view.type not in _PLUGIN_VIEWS:
            available = ", ".join([*_READS, *sorted(_PLUGIN_VIEWS)])
            raise ValueError(f"{where}.type is {view.type!r}; available: {available}; loss.plugin can register others")
        if view.options and view.type in _READS:
            raise ValueError(f"{where}.options is for the types of plug-ins, not for `{view.type}`; remove it")
        if view.min_area > view.max_area:
            raise ValueError(f"{where}.min_area is {view.min_area:g}, above its max_area={view.max_area:g}; swap them")
        if view.type == "mask" and not masked_cells(view.share):
            raise ValueError(f"{where}.share is {view.share:g}, less than one of the mask's cells; raise it to 0.01")
        try:
            json.dumps(view.options, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}.options cannot be written as JSON ({error}); use texts and numbers") from error


def without_images(prompt: Sequence[Turn]) -> tuple[Turn, ...]:
    """The prompt's turns without their image parts; a turn of images alone keeps an empty text."""
    texts = (tuple(part for part in turn.content if part.type == "text") for turn in prompt)
    return tuple(Turn(turn.role, kept or (ContentPart("text"),)) for turn, kept in zip(prompt, texts, strict=True))


class Views:
    """Makes the views of groups. Can be pickled; types of plug-ins are looked up when used.

    Args:
        encoder: Encoder of the groups.
        views: `loss.views`.
        seed: Seed of the random draws.

    Raises:
        ValueError: See `check_views`; or noise in pixel space for an image processor without three channels.
    """

    def __init__(self, encoder: Encoder, views: Mapping[str, ViewConfig], seed: int):
        check_views(views)
        self.encoder = encoder
        self._views = dict(views)
        self._mean, self._std = normalisation(encoder.processor.image_processor)
        self._identities = {name: _identity(view, seed) for name, view in views.items()}
        self._seed = seed
        for name, view in views.items():
            if view.type == "noise" and view.space == "pixel" and not len(self._mean) == len(self._std) == 3:
                raise ValueError(
                    f"loss.views.{name}: noise in pixel space needs an image processor with a mean and standard "
                    f"deviation of three channels (image_mean: {self._mean!r}, image_std: {self._std!r}); set its "
                    "space to normalised"
                )

    def identity(self, name: str) -> str:
        """Canonical JSON text of what determines view `name` for a given encoder, record and content of its images.

        For a plug-in's type, this includes all options, but not its code.
        """
        return self._identities[name]

    def is_of_plugin(self, name: str) -> bool:
        """Whether a plug-in makes view `name`."""
        return self._views[name].type not in _READS

    def needs_other_images(self, name: str) -> bool:
        """Whether view `name` shows the `other_images` of a record."""
        return self._views[name].type == "other"

    def prompt(
        self,
        name: str,
        group: PreferenceGroup,
        pictures: Sequence[Image.Image],
        clean: EncodedImages,
        clean_prompt: EncodedPrompt | None = None,
    ) -> EncodedPrompt:
        """The group's prompt under view `name`.

        Args:
            pictures: The group's decoded images; not changed.
            clean: Their encoding.
            clean_prompt: The group's prompt with these images: spares tokenizing the prompt again if the view has as
                many image tokens.

        Raises:
            EncodingError: The group has no images, or not as many `other_images`.
            ImageError: One of `other_images` cannot be read, or the image processor rejects the view's shape.
        """
        if not group.images:
            raise EncodingError(
                f"record {group.id!r}: it has no image, which view {name!r} (loss.views) would change; set "
                "data.text_only to drop, or remove the loss terms that use views"
            )
        if self._views[name].type == "none":
            return self.encoder.encode_prompt(group.id, (), without_images(group.prompt))
        images = self._images(name, group, pictures, clean)
        if clean_prompt is not None and images.places == clean.places:
            return replace(clean_prompt, image_inputs=images.inputs)
        return self.encoder.encode_prompt(group.id, images, group.prompt)

    def _images(
        self, name: str, group: PreferenceGroup, pictures: Sequence[Image.Image], clean: EncodedImages
    ) -> EncodedImages:
        view, encoder = self._views[name], self.encoder
        if view.type == "other":
            if len(group.other_images) != len(group.images):
                raise EncodingError(
                    f"record {group.id!r}: it has {len(group.other_images)} other_images for {len(group.images)} "
                    f"images, but view {name!r} (loss.views) needs as many; correct the record or remove the view"
                )
            return encoder.encode_pictures(encoder.open_pictures(group.other_images), group.other_images)
        seed = derive_seed(self._seed, "view", self._identities[name], group.id)
        generator = torch.Generator().manual_seed(seed)
        if view.type == "noise" and view.space == "normalised":
            return diffuse_images(clean, encoder.family, view.step, generator)
        return encoder.encode_pictures([self._changed(name, one, generator) for one in pictures], group.images)

    def _changed(self, name: str, picture: Image.Image, generator: torch.Generator) -> Image.Image:
        view = self._views[name]
        if view.type == "noise":  # over the padding too, as in normalised space
            padding = self.encoder.padding
            picture = picture if padding is None else pad_to_square(picture, padding)
            return noise_picture(picture, view.step, self._mean, self._std, generator)
        if view.type == "crop":
            return crop_picture(picture, view.min_area, view.max_area, generator)
        if view.type == "mask":
            return mask_picture(picture, view.share, generator)
        if view.type not in _PLUGIN_VIEWS:
            raise RuntimeError(
                f"loss.views.{name}: type {view.type!r} is not registered in this process; load its plug-in"
            )
        changed = _PLUGIN_VIEWS[view.type](picture.copy(), view, generator)
        if not isinstance(changed, Image.Image) or changed.mode != "RGB":
            raise TypeError(f"loss.views.{name}: type {view.type!r} must return an RGB picture, not {changed!r}")
        return changed


def _identity(view: ViewConfig, seed: int) -> str:
    read = {"type", *_READS[view.type]} if view.type in _READS else {entry.name for entry in fields(view)}
    values = {entry: getattr(view, entry.name) for entry in fields(view) if entry.name in read}
    # 1 and 1.0 are the same view.
    options = {entry.name: float(value) if entry.type == "float" else value for entry, value in values.items()}
    if len(options) > 1:  # random
        options["seed"] = seed
    return json.dumps(options, sort_keys=True, allow_nan=False)
