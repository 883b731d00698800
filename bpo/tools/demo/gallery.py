"""Examples for the report: training groups with their weakened images, evaluation scenes before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from bpo.bootstrap.weaken import weaken_images
from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.data.encode import Encoder, load_encoder
from bpo.evaluation.files import read_synonyms
from bpo.formats.files import read_groups
from bpo.formats.images import load_image
from bpo.formats.lexicon import ObjectLexicon
from bpo.records import Completion, PreferenceGroup
from bpo.tools.demo.report import NEGATIVES, EvaluationExample, MarkedAnswer, TrainingExample, mark_answer

if TYPE_CHECKING:
    from bpo.tools.demo.recipe import Recipe

NUM_EXAMPLES = 6


def training_examples(root: Path, recipe: Recipe) -> tuple[TrainingExample, ...]:
    """Groups with all kinds of negatives, and the weakened image exactly as given to the model."""
    images = root / "world" / "images"
    config = Config(model=ModelConfig(path=str(root / "base")), data=DataConfig(image_root=str(images)))
    encoder = load_encoder(config)
    lexicon = read_synonyms(root / "world" / "eval" / "synonyms.txt")
    groups = read_groups(root / "groups.jsonl")
    rich = sorted(groups, key=lambda g: -len({c.type for c in g.completions}))[:NUM_EXAMPLES]
    return tuple(_training_example(group, encoder, lexicon) for group in rich)


def _training_example(group: PreferenceGroup, encoder: Encoder, lexicon: ObjectLexicon) -> TrainingExample:
    chosen = max(group.own_completions or group.completions, key=lambda c: c.score)
    # The annotations of the demo's world are complete: objects that they do not name are absent.
    present = frozenset(mention.object for mention in lexicon.mentions(chosen.response))
    noised = next((c for c in group.completions if c.provenance and (c.provenance.noise_step or -1) >= 0), None)
    return TrainingExample(
        id=group.id,
        prompt=" ".join(turn.text for turn in group.prompt).strip(),
        scene=load_image(encoder.image_root, group.images[0]),
        weakened=_weakened_image(group, noised, encoder) if noised else None,
        noise_step=noised.provenance.noise_step if noised and noised.provenance else None,
        chosen=mark_answer("chosen: annotation", chosen.response, present, lexicon),
        rejected=tuple(
            mark_answer(f"rejected: {NEGATIVES[c.type]}", c.response, present, lexicon)
            for c in group.completions
            if c.score < chosen.score and c.type != "mllm-self"
        ),
    )


def _weakened_image(group: PreferenceGroup, completion: Completion, encoder: Encoder) -> Image.Image:
    """The noised, normalised pixels converted back to an image."""
    provenance = completion.provenance
    assert provenance is not None and provenance.seed is not None and provenance.noise_step is not None
    images = encoder.encode_images(group.images)
    weakened = weaken_images(images, encoder.family, provenance.noise_step, provenance.seed)
    processor = encoder.processor.image_processor
    pixels_CHW = weakened.inputs["pixel_values"][0]
    mean, std = (pixels_CHW.new_tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    bytes_HWC = ((pixels_CHW * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(bytes_HWC)


def evaluation_examples(root: Path) -> tuple[EvaluationExample, ...]:
    """Evaluation scenes, evenly spaced among those on which the base model hallucinates."""
    lexicon = read_synonyms(root / "world" / "eval" / "synonyms.txt")
    base, after = (_descriptions(root / name / "evaluation.json") for name in ("base", "bpo/model"))
    wrong = [image for image, entry in base.items() if entry["hallucinated"]]
    picked = wrong[:: max(1, len(wrong) // NUM_EXAMPLES)][:NUM_EXAMPLES]
    return tuple(
        EvaluationExample(
            id=image,
            scene=load_image(root / "world" / "images", image),
            present=tuple(base[image]["present"]),
            answers=(_marked("base", base[image], lexicon), _marked("after BPO", after[image], lexicon)),
        )
        for image in picked
    )


def _descriptions(path: Path) -> dict[str, dict]:  # type: ignore[type-arg]
    tree = json.loads(path.read_text(encoding="utf-8"))
    chair = next(result for result in tree["benchmarks"] if result["type"] == "chair")
    return {item["image"]: item for item in chair["items"]}


def _marked(label: str, entry: dict, lexicon: ObjectLexicon) -> MarkedAnswer:  # type: ignore[type-arg]
    return mark_answer(label, entry["answer"], frozenset(entry["present"]), lexicon)
