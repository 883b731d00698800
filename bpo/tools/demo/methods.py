"""Preference groups of the demo's world with the fields that other methods than BPO need.

`write_method_groups` adds to bootstrapped groups what a recipe of bpo/recipes/methods/ may ask of its data. Fields that
only some losses read (weights of characters, another scene, another question) are in one file for all methods. Fields
that would change every loss (a beta per answer, two preferred answers, prompts with a start) are in files of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from pathlib import Path

import numpy as np

from bpo.formats.files import read_groups
from bpo.formats.schema import group_to_json
from bpo.job.durable import replacing
from bpo.job.journal import to_line
from bpo.job.seeds import derive_seed
from bpo.records import Auxiliary, Completion, ContentPart, PreferenceGroup, Turn
from bpo.tools.demo.base import NO, YES
from bpo.tools.demo.sprites import NAMES, NUM_OBJECTS, OBJECTS, companions
from bpo.tools.demo.world import Scene, WorldConfig, caption_of, question_about, sample_scene

WRONG_WEIGHT = 5.0
OWN_TYPES = ("mllm-self", "mllm-hal")
PAPER_TYPES = ("mllm-hal", "llm-hal")

_OBJECT_OF = {name: index for index, thing in enumerate(OBJECTS) for name in (thing.name, *thing.synonyms)}
_NAMED = re.compile(rf"\ban? ({'|'.join(sorted(_OBJECT_OF, key=len, reverse=True))})\b")


@dataclass(frozen=True, kw_only=True)
class MethodGroups:
    """The files of `write_method_groups`.

    Attributes:
        shared: For every method that is not named below.
        difficulty: `shared` with a beta per dispreferred answer, for DA-DPO.
        corrected: Annotation and corrected own answer, both preferred to the own answer, for OPA-DPO.
        started: Prompts that end with the start of the answer, for SENTINEL.
    """

    shared: Path
    difficulty: Path
    corrected: Path
    started: Path


@dataclass(frozen=True, kw_only=True)
class MethodData:
    """What a method trains on.

    Attributes:
        file: Field of `MethodGroups`.
        completion_types: For `train.completion_types`; by default the paper's two sources.
        after: Method whose trained model it starts from; empty starts from the base model.
    """

    file: str = "shared"
    completion_types: tuple[str, ...] = PAPER_TYPES
    after: str = ""

    def path(self, groups: MethodGroups) -> Path:
        path: Path = getattr(groups, self.file)
        return path


# Recipe -> its data, where they are not `MethodData()`.
DATA_OF = {
    "da-dpo": MethodData(file="difficulty"),
    "ddpo": MethodData(completion_types=("llm-hal",)),
    "opa-dpo": MethodData(file="corrected", completion_types=(), after="opa-sft"),
    "opa-sft": MethodData(file="corrected", completion_types=()),
    "povid-1": MethodData(completion_types=("llm-hal",)),
    "povid-2": MethodData(completion_types=("llm-hal",), after="povid-1"),
    "povid-2-shared": MethodData(completion_types=("llm-hal",), after="povid-1"),
    "sena": MethodData(completion_types=("mllm-hal",)),
    "sentinel": MethodData(file="started", completion_types=()),
}


def data_of(method: str) -> MethodData:
    return DATA_OF.get(method, MethodData())


def objects_in(text: str) -> list[tuple[int, int, int]]:
    """The objects that an answer names, in order: (object, start, end), the span of "a NAME" in characters."""
    return [(_OBJECT_OF[match[1]], *match.span()) for match in _NAMED.finditer(text)]


def write_method_groups(bootstrapped: Path, folder: Path, world: WorldConfig) -> MethodGroups:
    """Writes the groups of all methods from those of `bpo bootstrap` on the annotations of a world.

    Deterministic in the groups and the world's seed.

    Raises:
        ValueError: A group is not of one of the world's annotations.
    """
    groups = list(read_groups(bootstrapped))
    scenes = [_scene_of(group, world) for group in groups]
    partners = partners_of(scenes, world.seed)
    shared = [
        _with_shared_fields(group, scene, groups[k], scenes[k], world.seed)
        for group, scene, k in zip(groups, scenes, partners, strict=True)
    ]
    pairs = list(zip(shared, scenes, strict=True))
    paths = MethodGroups(**{name: folder / f"{name}.jsonl" for name in MethodGroups.__dataclass_fields__})
    _write(paths.shared, shared)
    _write(paths.difficulty, (with_difficulty(group, scene) for group, scene in pairs))
    _write(paths.corrected, (g for group, scene in pairs for g in corrected_groups(group, scene)))
    _write(paths.started, (g for group, scene in pairs for g in started_groups(group, scene)))
    return paths


def _write(path: Path, groups: Iterable[PreferenceGroup]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        for group in groups:
            file.write(to_line(group_to_json(group)))


def _scene_of(group: PreferenceGroup, world: WorldConfig) -> Scene:
    found = re.fullmatch(r"train_(\d{6})", group.id)
    if found is None or int(found[1]) >= world.num_annotations:
        raise ValueError(
            f"group {group.id!r} is not of an annotation of this world; bootstrap the annotations of build_world"
        )
    return sample_scene(world, "annotations", int(found[1]))


def partners_of(scenes: Sequence[Scene], seed: int) -> list[int]:
    """For each scene the index of another one with another caption, and about as many objects."""
    order = sorted(range(len(scenes)), key=lambda i: (len(scenes[i].objects), derive_seed(seed, "partner", i)))
    partners = [0] * len(scenes)
    for place, i in enumerate(order):
        others = (*order[place + 1 :], *reversed(order[:place]))
        partners[i] = next((k for k in others if scenes[k].objects != scenes[i].objects), i)
    return partners


def _with_shared_fields(
    group: PreferenceGroup, scene: Scene, other: PreferenceGroup, other_scene: Scene, seed: int
) -> PreferenceGroup:
    """The group with the scene and annotation of another group, a question, and weights of wrong objects.

    The model's own answer, to the clean image, is what SELM's term is on.
    """
    described = Completion(other_scene.caption, 1.0, "other", view="other")
    return replace(
        group,
        completions=(*(_with_marks(c, scene) for c in group.completions), described),
        other_images=other.images,
        auxiliary=(question_of(scene, np.random.default_rng(derive_seed(seed, "auxiliary", group.id))),),
    )


def _with_marks(completion: Completion, scene: Scene) -> Completion:
    """Weights the objects that the scene lacks `WRONG_WEIGHT` times, "a NAME" each; marks the model's own answer."""
    named = objects_in(completion.response)
    wrong = tuple((start, end, WRONG_WEIGHT) for thing, start, end in named if thing not in scene.objects)
    return replace(completion, token_weights=wrong, explored=completion.type == OWN_TYPES[0])


def question_of(scene: Scene, rng: np.random.Generator) -> Auxiliary:
    """A question about an object and its true answer, as the base model was taught; an absent object is a companion
    of a present one if there is one.
    """
    mates = sorted({mate for thing in scene.objects for mate in companions(thing)} - set(scene.objects))
    absent = mates or [thing for thing in range(NUM_OBJECTS) if thing not in scene.objects]
    present = not absent or rng.random() < 0.5
    thing = int(rng.choice(scene.objects if present else absent))
    parts = (ContentPart("image"), ContentPart("text", question_about(NAMES[thing])))
    return Auxiliary((Turn("user", parts),), YES if present else NO)


def wrong_share(text: str, scene: Scene) -> float:
    """Objects that only the answer or only the scene has, as a share of those of either: the Jaccard distance."""
    named = {thing for thing, _, _ in objects_in(text)}
    return len(named ^ set(scene.objects)) / len(named | set(scene.objects))


def with_difficulty(group: PreferenceGroup, scene: Scene) -> PreferenceGroup:
    """Gives each dispreferred answer beta = 1.5 - `wrong_share`: 0.5 if nothing is right, towards 1.5 if nearly all is.

    As in DA-DPO, easy pairs count less; its estimate from the margins of two models is replaced by the truth.
    """
    completions = (
        c if c.score > 0 else replace(c, beta=1.5 - wrong_share(c.response, scene)) for c in group.completions
    )
    return replace(group, completions=tuple(completions))


def corrected_groups(group: PreferenceGroup, scene: Scene) -> Iterator[PreferenceGroup]:
    """The annotation and the model's own answer without its wrong objects, both preferred to the own answer.

    The weight of the corrected answer is 0.5 plus the share of wrong objects among those that the own answer names.
    Groups without an answer of the model that is partly wrong are left out.
    """
    for own in sorted(group.completions, key=lambda c: c.type not in OWN_TYPES[:1]):
        named = [thing for thing, _, _ in objects_in(own.response)]
        right = [thing for thing in named if thing in scene.objects]
        if own.type in OWN_TYPES and 0 < len(right) < len(named):
            weight = 0.5 + (len(named) - len(right)) / len(named)
            text = caption_of([NAMES[thing] for thing in dict.fromkeys(right)])
            corrected = Completion(text, 1.0, "corrected", weight=weight)
            annotated = [c for c in group.completions if c.score > 0 and not c.view and c.response != text]
            yield replace(group, completions=(*annotated, corrected, own))
            return


def started_groups(group: PreferenceGroup, scene: Scene) -> Iterator[PreferenceGroup]:
    """For each dispreferred caption with a wrong object, a group whose prompt holds what it shares with a right one.

    The right caption has the objects before the first wrong one, then those of the scene that follow them. The start
    ends with a whole word: completions begin with the space before theirs.
    """
    for completion in group.completions:
        named = [thing for thing, _, _ in objects_in(completion.response)]
        first = next((k for k, thing in enumerate(named) if thing not in scene.objects), None)
        if completion.score > 0 or first is None or completion.response != caption_of([NAMES[t] for t in named]):
            continue
        kept = named[:first]
        right = caption_of([NAMES[t] for t in (*kept, *(t for t in scene.objects if not kept or t > kept[-1]))])
        start = commonprefix([right, completion.response]).rpartition(" ")[0]
        yield replace(
            group,
            id=f"{group.id}-{completion.type}",
            prompt=(*group.prompt, Turn("assistant", (ContentPart("text", start),))),
            completions=(
                Completion(right.removeprefix(start), 1.0, "gt"),
                Completion(completion.response.removeprefix(start), 0.0, completion.type),
            ),
            other_images=(),
            auxiliary=(),
        )


def method_names(recipes: Mapping[str, Path]) -> list[str]:
    """Methods in an order in which each one comes after the method whose model it starts from."""
    return sorted(recipes, key=lambda name: (bool(data_of(name).after), name))
