"""The average group as the loss packs it: its views, the completions behind each, and what separate sequences take.

Cells are selected by the `CellPlan` of the loss, as in training, in groups whose token ids stand for themselves: only
their numbers count. A plug-in's rule that reads token ids therefore sees none of the data's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

from bpo.config.training import Config
from bpo.data.cells import AUXILIARY, CLEAN, CellPlan, completion_ids, group_pairs, packed_members
from bpo.data.encode import EncodedGroup, EncodedPrompt, EncodedView
from bpo.data.useful_work import attended_pairs, has_class_token
from bpo.formats.usable import distinct_answers, keep_types, refusal
from bpo.records import PreferenceGroup, Turn, UsefulWork
from bpo.tools.plan.memory import Load

# Approximate tokens per English word in the tokenizers of these models, and of the chat template of a prompt; convert
# lengths known only in words.
_TOKENS_PER_WORD = 1.4
_TEMPLATE_TOKENS = 16
_TEXT, _IMAGE = 0, 1  # token ids
_WINDOW_PATCHES = 64  # patches of a window of Qwen2.5-VL's tower


@dataclass(frozen=True)
class ImageSize:
    """Tokens of an image, and its rows in the vision tower."""

    tokens: int
    patches: int


def typical_image(model_config: object) -> ImageSize:
    """An image of 1024 tokens for Qwen-VL, of the tower's input size for other families.

    LLaVA-NeXT and related models are counted with four tiles in addition to the whole image.
    """
    vision = model_config.vision_config  # type: ignore[attr-defined]
    merge = getattr(vision, "spatial_merge_size", None)
    if merge:
        return ImageSize(1024, 1024 * merge**2)
    side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    patches = (side // patch) ** 2
    tiles = 5 if getattr(model_config, "image_grid_pinpoints", None) else 1
    fixed = getattr(model_config, "mm_tokens_per_image", None)
    scale = getattr(model_config, "scale_factor", None) or 1
    if not fixed and scale == 1 and getattr(model_config, "downsample_ratio", None):
        scale = round(1 / model_config.downsample_ratio)  # type: ignore[attr-defined]
    tokens = tiles * (fixed or patches // scale**2)
    return ImageSize(tokens, tiles * (patches + int(has_class_token(model_config))))


@dataclass(frozen=True)
class ViewShape:
    """One prefix of a group with the completions packed behind it; means over groups.

    Attributes:
        name: Name in loss.views, `auxiliary0`, ... for auxiliary prompts, empty for the clean images.
        prefix_tokens: Tokens of images and prompt.
        images: Images through the vision tower.
        completions, response_tokens: Number of completions, and tokens of all of them.
        attended_pairs: (query, key) pairs of the language model's attention.
        separate_tokens: Tokens if each completion had a prefix of its own.
    """

    name: str
    prefix_tokens: float = 0.0
    images: float = 0.0
    completions: float = 0.0
    response_tokens: float = 0.0
    attended_pairs: float = 0.0
    separate_tokens: float = 0.0

    @property
    def tokens(self) -> float:
        return self.prefix_tokens + self.response_tokens

    def __add__(self, other: ViewShape) -> ViewShape:
        return ViewShape(self.name, *(a + b for a, b in zip(self._numbers(), other._numbers(), strict=True)))

    def mean(self, count: int) -> ViewShape:
        return ViewShape(self.name, *(number / count for number in self._numbers()))

    def _numbers(self) -> list[float]:
        return [getattr(self, entry.name) for entry in fields(self)[1:]]


@dataclass(frozen=True)
class PackedShape:
    """What one forward pass packs of an average group.

    Attributes:
        second_targets: Tokens that are scored at the rows of others (`pairs: argmax`).
    """

    views: tuple[ViewShape, ...]
    image: ImageSize
    second_targets: float = 0.0

    @property
    def tokens(self) -> int:
        return max(1, round(sum(view.tokens for view in self.views)))

    @property
    def separate_tokens(self) -> int:
        return round(sum(view.separate_tokens for view in self.views))

    def work(self, num_groups: float) -> UsefulWork:
        """Useful work of `num_groups` such groups; window attention in the tower is counted as full attention."""
        images = sum(view.images for view in self.views)
        patches = images * self.image.patches
        per_group = (
            self.tokens,
            sum(view.response_tokens for view in self.views),
            images * self.image.tokens,
            sum(view.attended_pairs for view in self.views),
            patches,
            patches * self.image.patches,
            patches * _WINDOW_PATCHES,
        )
        return UsefulWork(*(round(num_groups * value) for value in per_group))

    def load(self, tokens: float) -> Load:
        """Rows of a micro-batch of `tokens` packed tokens."""
        share = tokens / self.tokens
        work = self.work(share)
        return Load(tokens, work.responses, work.image_tokens, work.patches, share * self.second_targets)


@dataclass(frozen=True)
class GroupShape:
    """An average group: its own sizes in tokens, what a step packs of it, and what the reference pass does, if any."""

    image_tokens: float
    prompt_tokens: float
    response_tokens: float
    completions: float
    pairs: float
    step: PackedShape
    reference: PackedShape | None


class _Sums:
    """Adds up what a plan packs of groups."""

    def __init__(self, plan: CellPlan, image: ImageSize):
        self.plan, self.image = plan, image
        self.views: dict[str, ViewShape] = {}
        self.second_targets = 0

    def add(self, group: EncodedGroup) -> None:
        cells = self.plan.cells(group)
        for (name, _), member in zip(cells.packed, packed_members(group, cells), strict=True):
            prefix, lengths = len(member.prompt.prefix_ids), [len(ids) for ids in member.completion_ids]
            view = ViewShape(
                name,
                prefix,
                _num_images(member.prompt, self.image),
                len(lengths),
                sum(lengths),
                attended_pairs(prefix, lengths),
                prefix * len(lengths) + sum(lengths),
            )
            self.views[name] = self.views.get(name, ViewShape(name)) + view
        self.second_targets += sum(len(completion_ids(group, cell)) for cell in cells.virtual)

    def mean(self, count: int) -> PackedShape:
        views = tuple(view.mean(count) for view in self.views.values())
        return PackedShape(views, self.image, self.second_targets / count)


def average_group(groups: Iterable[EncodedGroup], plan: CellPlan, image: ImageSize) -> tuple[GroupShape, int]:
    """The average of groups and their number.

    Args:
        groups: As `typical_group` and `groups_of_records` make them, whose prefixes mark the tokens of images.

    Raises:
        ValueError: There is no group.
    """
    step, reference = _Sums(plan, image), _Sums(plan.reference_pass(), image)
    count = images = prompt = responses = completions = pairs = 0
    for group in groups:
        count += 1
        of_images = group.prompt.prefix_ids.count(_IMAGE)
        images += of_images
        prompt += len(group.prompt.prefix_ids) - of_images
        completions += len(group.completion_ids)
        responses += sum(len(ids) for ids in group.completion_ids)
        pairs += len(group_pairs(group))
        step.add(group)
        if plan.needs_reference:
            reference.add(group)
    if not count:
        raise ValueError("no group can be trained on with this configuration; `bpo check` names the reasons")
    of_reference = reference.mean(count) if plan.needs_reference else None
    sizes = (images / count, prompt / count, responses / completions, completions / count, pairs / count)
    return GroupShape(*sizes, step.mean(count), of_reference), count


def _num_images(prompt: EncodedPrompt, image: ImageSize) -> int:
    return prompt.prefix_ids.count(_IMAGE) // image.tokens


def typical_group(
    plan: CellPlan, image: ImageSize, prompt_tokens: int, response_tokens: int, completions: int
) -> EncodedGroup:
    """A group about one image with one preferred answer.

    An auxiliary prompt is taken to be as long as the prompt. Where a term compares answers about another image, the
    group has one such answer in addition; where a term is on explored answers, one that is in no pair. All answers have
    `response_tokens` tokens.
    """
    answer = (_TEXT,) * response_tokens
    others = [term.against for term in plan.terms if term.pairs in ("symmetric", "other")][:1]
    explored = int(plan.uses_explored)
    prompt = _prompt(image, 1, prompt_tokens)
    views = _views(plan, image, 1, 1, prompt_tokens)
    if plan.uses_auxiliary:
        views = (*views, EncodedView(f"{AUXILIARY}0", prompt, (answer,)))
    return EncodedGroup(
        prompt,
        (answer,) * (completions + len(others) + explored),
        (1.0, *[0.0] * (completions - 1), *[1.0] * (len(others) + explored)),
        described=(*[CLEAN] * completions, *others, *[CLEAN] * explored),
        views=views,
        paired=(*[True] * (completions + len(others)), *[False] * explored),
        explored=(*[False] * (completions + len(others)), *[True] * explored),
    )


def groups_of_records(
    records: Iterable[PreferenceGroup],
    config: Config,
    plan: CellPlan,
    image: ImageSize,
    prompt_tokens: int = 0,
    response_tokens: int = 0,
) -> Iterator[EncodedGroup]:
    """Groups of a file with lengths estimated from their words; those that training drops are left out.

    Args:
        prompt_tokens, response_tokens: If not 0, used instead of the estimates.
    """
    for record in records:
        group = keep_types(record, config.train.completion_types)
        keep_text_only = config.data.text_only == "keep"
        if refusal(group, max_words=config.data.max_completion_words, keep_text_only=keep_text_only):
            continue
        answers = distinct_answers(group.completions, lambda completion: completion.response)
        if answers is None or not _has_views(group, plan):
            continue
        own_prompt_tokens = prompt_tokens or _tokens_of_prompt(group.prompt)
        prompt = _prompt(image, len(group.images), own_prompt_tokens)
        views = _views(plan, image, len(group.images), len(group.other_images), own_prompt_tokens)
        longest = max(len(one.prefix_ids) for one in (prompt, *(view.prompt for view in views)))
        room = config.data.max_length_tokens - longest
        if room < 1:
            continue
        yield EncodedGroup(
            prompt,
            tuple((_TEXT,) * min(room, response_tokens or _tokens_of_text(text)) for text, _ in answers),
            tuple(completion.score for _, completion in answers),
            described=tuple(completion.view for _, completion in answers),
            views=(*views, *_auxiliary(group, config, plan, image)),
            paired=tuple(completion.paired for _, completion in answers),
            explored=tuple(completion.explored for _, completion in answers),
        )


def _has_views(group: PreferenceGroup, plan: CellPlan) -> bool:
    """Whether a record has what the views and auxiliary terms of the loss need."""
    types = {plan.views[name].type for name in plan.view_names}
    if types and not group.images or plan.uses_auxiliary and not group.auxiliary:
        return False
    return "other" not in types or len(group.other_images) == len(group.images)


def _views(
    plan: CellPlan, image: ImageSize, images: int, other_images: int, prompt_tokens: int
) -> tuple[EncodedView, ...]:
    """Changed images take as many tokens as the clean ones; `none` takes none. A plug-in's types count as changed."""
    counts = {"none": 0, "other": other_images}
    return tuple(
        EncodedView(name, _prompt(image, counts.get(plan.views[name].type, images), prompt_tokens))
        for name in plan.view_names
    )


def _auxiliary(group: PreferenceGroup, config: Config, plan: CellPlan, image: ImageSize) -> list[EncodedView]:
    views = []
    for k, entry in enumerate(group.auxiliary if plan.uses_auxiliary else ()):
        prompt = _prompt(image, len(group.images), _tokens_of_prompt(entry.prompt))
        room = max(1, config.data.max_length_tokens - len(prompt.prefix_ids))
        answer = (_TEXT,) * min(room, _tokens_of_text(entry.response))
        views.append(EncodedView(f"{AUXILIARY}{k}", prompt, (answer,)))
    return views


def _prompt(image: ImageSize, images: int, prompt_tokens: int) -> EncodedPrompt:
    return EncodedPrompt("", (*(_IMAGE,) * (images * image.tokens), *(_TEXT,) * prompt_tokens), {})


def _tokens_of_prompt(prompt: Sequence[Turn]) -> int:
    return round(_TOKENS_PER_WORD * sum(len(turn.text.split()) for turn in prompt)) + _TEMPLATE_TOKENS


def _tokens_of_text(text: str) -> int:
    return max(1, round(_TOKENS_PER_WORD * len(text.split())))
