"""Compares an exported model with the model that was trained, on a sample of the preference groups.

The model before training (the base, or the base with the adapter that training continued), the trained model (base and
adapter, never merged) and the export as read back from disk are loaded one after the other.
Their log-probs of all completion tokens are computed by the forward pass of training, and both answer the prompts
greedily. What counts is not the gap alone but the gap relative to what training changed: a short run changes little.

Shape letter: N completion tokens of the sample.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bpo.config.adapter import split_adapter
from bpo.config.training import Config, ExportConfig, ModelConfig
from bpo.data.encode import Dropped, EncodedGroup, Encoder, EncodingError, load_encoder
from bpo.data.families import family_of
from bpo.formats.bad_records import BadRecords
from bpo.formats.files import iterate_groups
from bpo.formats.problems import RecordError
from bpo.job.launch import pick_device
from bpo.job.seeds import derive_seed
from bpo.model.generate import generate_answers
from bpo.model.group_scores import GroupScorer
from bpo.model.load import load_resolved, resolve_model
from bpo.model.trainable import prepare_trainable
from bpo.records import PreferenceGroup

logger = logging.getLogger(__name__)

ANSWER_TOKENS = 32
# Below it an export is accepted with a warning; above export.min_survived.
WARN_SURVIVED = 0.9
# A mean difference of log-probs that the arithmetic alone may cause, which says nothing about the export.
NOISE_NATS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
_MAX_TOKENS = 8192
# Puts the trained weights into a base model that was loaded for inference, in place; returns the model to run.
Change = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Figures of a comparison; log-probs in nats per token.

    num_groups, num_tokens: Size of the sample: groups, completion tokens.
    mean_change: Mean |trained - before|, what training did.
    mean_gap, max_gap: Mean and largest |exported - trained|.
    survived: Projection of (exported - before) on (trained - before), over tokens; None if training changed nothing.
    answers, answers_differ: Greedy answers of up to `ANSWER_TOKENS` tokens, and how many differ from the trained
        model's.
    dtype: Of the arithmetic.
    """

    num_groups: int
    num_tokens: int
    mean_change: float
    mean_gap: float
    max_gap: float
    survived: float | None
    answers: int
    answers_differ: int
    dtype: str


class NoSampleError(ValueError):
    """No group of the file can be used for a comparison."""


def sample_groups(config: Config, encoder: Encoder) -> list[EncodedGroup]:
    """`export.check_groups` groups of `data.groups`, those with the smallest hashes of their ids, encoded.

    The sample does not depend on the order of the file. Groups that cannot be read or encoded are passed over.

    Raises:
        NoSampleError: the file has no group that can be used.
    """
    wanted = config.export.check_groups
    bad = BadRecords("quarantine", 1.0)
    # As many again, for those that cannot be encoded.
    drawn = heapq.nsmallest(
        2 * wanted, iterate_groups(Path(config.data.groups), bad), key=lambda group: derive_seed(0, group.id)
    )
    found, reason = [], f"{len(bad.problems)} bad records" if bad.problems else "no groups"
    for group in drawn:
        encoded = _encoded(encoder, group)
        if isinstance(encoded, EncodedGroup):
            found.append(encoded)
        else:
            reason = f"{group.id}: {encoded}"
        if len(found) == wanted:
            break
    if not found:
        raise NoSampleError(
            f"data.groups {config.data.groups}: no group to compare the export on ({reason}); give --data.groups and "
            "--data.image_root, or turn the comparison off with --export.check_groups 0"
        )
    return found


def _encoded(encoder: Encoder, group: PreferenceGroup) -> EncodedGroup | str:
    try:
        encoded = encoder.encode_group(group)
    except (RecordError, EncodingError) as error:
        return str(error)
    return encoded.detail if isinstance(encoded, Dropped) else encoded


def compare(config: Config, trained: Change, exported: Change, export: ModelConfig) -> Fidelity:
    """Compares base, trained and exported model on `sample_groups`.

    Args:
        config: `model` is that before training, in the dtype in which it was trained; `data` as in training.
        trained: Makes the trained model of the base, without an adapter.
        exported: Makes the exported model of what is loaded from `export`.
        export: Model to load before `exported`: the exported directory of a merged model, the base of an adapter.

    Raises:
        NoSampleError: see `sample_groups`.
    """
    before, export = (replace(m, attention="auto", gradient_checkpointing="none") for m in (config.model, export))
    base, _ = split_adapter(before)
    encoder = load_encoder(config)
    groups = sample_groups(config, encoder)
    dtype = getattr(torch, config.export.check_dtype)
    logger.info(
        "comparing base, trained and exported model on %d groups, in %s", len(groups), config.export.check_dtype
    )

    def logp(options: ModelConfig, change: Change) -> torch.Tensor:
        return _logp(options, change, encoder, groups, dtype)

    before_N = logp(before, unchanged)
    trained_N = logp(base, trained)
    exported_N = logp(export, exported)
    change_N, gap_N = (trained_N - before_N).double(), (exported_N - trained_N).double()
    squares = float((change_N**2).sum())
    texts = [
        _answers(options, change, encoder, groups, dtype) for options, change in ((base, trained), (export, exported))
    ]
    return Fidelity(
        num_groups=len(groups),
        num_tokens=len(before_N),
        mean_change=float(change_N.abs().mean()),
        mean_gap=float(gap_N.abs().mean()),
        max_gap=float(gap_N.abs().max()),
        survived=float(((change_N + gap_N) * change_N).sum()) / squares if squares else None,
        answers=len(groups),
        answers_differ=sum(one != other for one, other in zip(*texts, strict=True)),
        dtype=config.export.check_dtype,
    )


def _load(options: ModelConfig, change: Change, dtype: torch.dtype, *, for_training: bool) -> tuple[Any, Any]:
    """Loads in the stored dtype, applies `change`, and only then converts: base weights as they were in training."""
    computing = replace(options, dtype=str(dtype).removeprefix("torch."))  # type: ignore[arg-type]
    resolved = resolve_model(computing, pick_device(), for_training=for_training)
    model = load_resolved(replace(resolved, dtype=resolve_model(options).dtype))
    return change(model).to(dtype).eval(), resolved


@torch.inference_mode()
def _logp(
    options: ModelConfig, change: Change, encoder: Encoder, groups: Sequence[EncodedGroup], dtype: torch.dtype
) -> torch.Tensor:
    model, resolved = _load(options, change, dtype, for_training=True)
    scorer = GroupScorer(resolved, encoder, model)
    return torch.cat([torch.cat(values) for _, _, values in scorer.score(enumerate(groups), _MAX_TOKENS)])


def _answers(
    options: ModelConfig, change: Change, encoder: Encoder, groups: Sequence[EncodedGroup], dtype: torch.dtype
) -> list[str]:
    model, _ = _load(options, change, dtype, for_training=False)
    model.to(pick_device())
    return [
        answer
        for group in groups
        for answer in generate_answers(
            model, encoder, [group.prompt], max_new_tokens=ANSWER_TOKENS, temperature=0.0, top_p=1.0, seeds=[0]
        )
    ]


def trained_change(config: Config, state: dict[str, torch.Tensor]) -> Change:
    """Adds the adapter to a base model and loads the trained parameters, as training had them; nothing is merged."""

    def change(model: Any) -> Any:
        prepare_trainable(model, family_of(model.config), config)
        model.load_state_dict(state, strict=False)
        return model

    return change


def unchanged(model: Any) -> Any:
    """Of a model whose weights on disk already are the ones wanted."""
    return model


def adapter_change(directory: Path) -> Change:
    """Loads an adapter from disk with PEFT."""

    def change(model: Any) -> Any:
        import peft

        return peft.PeftModel.from_pretrained(model, str(directory)).get_base_model()

    return change


def table(weights: dict[str, Any], tokens: Fidelity | None) -> list[str]:
    """Lines for the log and the model card: what of the training's change is in the export."""

    def percent(value: float | None) -> str:
        return "no change" if value is None else f"{100 * value:.1f} %"

    lines = ["| figure | value |", "|---|---|"]
    if weights:
        lines += [
            f"| change of the weights that survived | {percent(weights['survived'])} |",
            f"| error of the weights, relative to the change | {percent(weights['relative_error'])} |",
            f"| changed weights that the export leaves unchanged | {percent(weights['unchanged_share'])} |",
            f"| rms change of a weight | {weights['rms_change']:.2e} |",
        ]
    if tokens is not None:
        lines += [
            f"| sample | {tokens.num_groups} groups, {tokens.num_tokens:,} tokens, {tokens.dtype} arithmetic |",
            f"| change of log-probs that survived | {percent(tokens.survived)} |",
            f"| mean change of a token's log-prob by training | {tokens.mean_change:.2e} |",
            f"| mean difference exported - trained | {tokens.mean_gap:.2e} |",
            f"| largest difference exported - trained | {tokens.max_gap:.2e} |",
            f"| greedy answers that differ | {tokens.answers_differ} of {tokens.answers} |",
        ]
    return lines


def judge(limits: ExportConfig, weights: dict[str, Any], tokens: Fidelity | None) -> None:
    """Warns if the export lost part of the training, or if training did nothing.

    Raises:
        ValueError: it lost more than `export.min_survived` and `export.max_gap` allow; says how to keep it.
    """
    shares: dict[str, float] = {}
    if weights and weights["survived"] is not None:
        shares["of the weights"] = weights["survived"]
    gap = 0.0
    if tokens is not None and tokens.survived is not None and tokens.mean_gap > NOISE_NATS[tokens.dtype]:
        shares["of the log-probs"] = tokens.survived
        gap = tokens.mean_gap / tokens.mean_change
    fixes = (
        "Keep the change with --export.dtype float32, --export.rounding stochastic or --export.form adapter; or accept "
        f"this with --export.min_survived and --export.max_gap (now {limits.min_survived:g} and {limits.max_gap:g})"
    )
    lost = [f"{100 * share:.1f} % of the change {what} survived" for what, share in shares.items()]
    if gap:
        lost.append(f"log-probs differ from the trained model's by {gap:.2f} times what training changed")
    lowest = min(shares.values(), default=1.0)
    if lowest < limits.min_survived or gap > limits.max_gap:
        raise ValueError(f"the exported model is not the trained one: {', '.join(lost)}. {fixes}")
    if lowest < WARN_SURVIVED:
        logger.warning("the export lost part of the training: %s. %s", ", ".join(lost), fixes)
    if (weights and weights["survived"] is None) or (tokens is not None and tokens.survived is None):
        logger.warning("training changed nothing: the trained model is the base model")
