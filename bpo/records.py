"""Records passed between the stages of bpo; every stage takes and returns one of these.

Shape letters: T packed tokens, N response tokens (predictor rows), G groups, K completions (cells), P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # reading and writing records does not need torch
    from collections.abc import Callable

    import torch

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class ContentPart:
    """One part of a turn: text, or a placeholder for the next image."""

    type: Literal["text", "image"]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation as structured content, the form a chat template takes."""

    role: Role
    content: tuple[ContentPart, ...]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content if part.type == "text")

    @property
    def num_images(self) -> int:
        return sum(part.type == "image" for part in self.content)


@dataclass(frozen=True, slots=True)
class Annotation:
    """One or more images, a prompt that ends with a user turn, and the dataset's answer.

    `extra` holds the file's fields that bpo does not read; they are passed through.
    """

    id: str
    images: tuple[str, ...]
    prompt: tuple[Turn, ...]
    response: str
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Provenance:
    """How a completion was generated, in enough detail to reproduce it.

    Attributes:
        source: Generator: `weakened-image`, `injected-errors` ...
        noise_step: Forward diffusion step that weakened the image.
        space: Space of the noise: `normalised` pixels, or `pixel` values before the image processor.
        kept_words: Number of words of the annotation that it starts with.
        candidate: Which of several candidates of its source it is, from 1; None for the first, which is number 0.
        donor: Id of the record from whose annotation the text, or the exchanged word, was taken.
        policy: Fingerprint of the weights that generated it (`bpo.model.weights.policy_fingerprint`).
    """

    source: str
    model: str | None = None
    noise_step: int | None = None
    mode: str | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    space: str | None = None
    kept_words: int | None = None
    candidate: int | None = None
    donor: str | None = None
    policy: str | None = None
    top_k: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer with its score (higher is preferred) and type (`gt`, `mllm-hal`, `llm-hal`, ...).

    Attributes:
        weight: The weight of a pair in the loss is the product of the `weight`s of its two completions.
        beta: The inverse temperature of a pair is the loss's, times the `beta`s of its two completions.
        token_weights: `(start, end, weight)` of spans of characters of the response, in order and disjoint; other
            characters have weight 1. For `loss.terms[].token_weights: data`.
        view: `other` if it describes the group's `other_images`; empty if it describes its images.
        paired: Whether it takes part in preference pairs; without, only terms with `pairs: explored` read it.
        explored: Whether terms with `pairs: explored` are on it (SELM).
    """

    response: str
    score: float
    type: str
    provenance: Provenance | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    weight: float = 1.0
    beta: float = 1.0
    token_weights: tuple[tuple[int, int, float], ...] = ()
    view: str = ""
    paired: bool = True
    explored: bool = False


@dataclass(frozen=True, slots=True)
class Auxiliary:
    """Another prompt about the group's images with its answer, for likelihood terms (`pairs: auxiliary`)."""

    prompt: tuple[Turn, ...]
    response: str


@dataclass(frozen=True, slots=True)
class PreferenceGroup:
    """One prompt about one or more images and K >= 2 completions.

    The preference pairs are all (i, j) with `score_i > score_j` (arXiv 2403.08730, released schema), of completions
    that describe `images` and are `paired`. `extra`, here and in a completion, holds the file's fields that bpo does
    not read; they are passed through.

    Attributes:
        prompt: Ends with a user turn, or with the start of the assistant's answer, which the completions continue. The
            start belongs to the prefix: it has no loss.
        other_images: Images of another scene for the view `other`, as many as `images`.
        auxiliary: Other prompts about the images with their answers.
    """

    id: str
    images: tuple[str, ...]
    prompt: tuple[Turn, ...]
    completions: tuple[Completion, ...]
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    other_images: tuple[str, ...] = ()
    auxiliary: tuple[Auxiliary, ...] = ()

    @property
    def own_completions(self) -> tuple[Completion, ...]:
        """The completions that describe `images` and are paired, between which there are preference pairs."""
        return tuple(completion for completion in self.completions if completion.paired and not completion.view)


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Positions of prefixes and completions in a packed row; attention uses nothing else.

    Spans are half-open `(start, end)` in the row, ascending and without gaps:
    prefix_0, its completions, prefix_1, its completions, ...
    A final prefix of no group, without completions, holds a stand-in image (`collate_groups`).
    In a batch of separate sequences there are gaps: padding, and a copy of the prefix per completion but the first.
    """

    prefix_spans: tuple[tuple[int, int], ...]
    completion_spans: tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True, slots=True)
class UsefulWork:
    """Inputs of the FLOP count of a micro-batch or step: rows per part of the model, and attention pairs.

    tokens: packed tokens through the language model.
    responses: rows that reach the LM head.
    image_tokens: rows of the projector's output.
    pairs: (query, key) pairs of the language model's attention, in one layer and one head.
    patches: rows of the vision tower, class tokens included.
    patch_pairs, patch_window_pairs: pairs of its attention in layers over whole images, and in layers over windows.
    """

    tokens: int = 0
    responses: int = 0
    image_tokens: int = 0
    pairs: int = 0
    patches: int = 0
    patch_pairs: int = 0
    patch_window_pairs: int = 0

    def __add__(self, other: UsefulWork) -> UsefulWork:
        return UsefulWork(*(getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(self)))


@dataclass(frozen=True, slots=True)
class WeighedTokens:
    """Tokens of the sides of pairs whose weights are not all 1. Shape letter: E tokens of all such sides.

    token_E: [E] int64, index among the N tokens.
    side_E: [E] int64, 2 p for the preferred and 2 p + 1 for the dispreferred side of pair p.
    weight_E: [E] weights.
    tokens_of_term: number of such tokens of each term.
    """

    token_E: torch.Tensor
    side_E: torch.Tensor
    weight_E: torch.Tensor
    tokens_of_term: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SecondTargets:
    """Tokens scored at rows whose own targets are others: what a model finds most likely under another view.

    Shape letter: M such tokens; their log-probs follow those of the packed tokens.

    base_M: [M] int64, the predictor row (among the packed tokens) that scores them.
    source_M: [M] int64, the row whose most likely token is scored.
    token_M: [M] int64, the tokens themselves, or None to take those of `source_M`.
    """

    base_M: torch.Tensor
    source_M: torch.Tensor
    token_M: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Inputs of a loss other than the policy's log-probs; collated once and passed on unchanged.

    K cells (completions under a view) with N tokens; the pairs of all terms follow each other. The index -1 of a pair's
    side is the constant 0.

    completion_of_token_N: [N] int64, index into the K cells of the batch.
    completion_starts_K1: [K + 1] int64, offset of each cell's first token among the N, and N at the end.
    pairs_P2: [P, 2] int64, (preferred, dispreferred) cells or -1.
    pair_weight_P: [P] weight of each pair's loss; 0 in a filler: a batch that only keeps a rank in lockstep.
    pair_beta_P: [P] inverse temperature of each pair.
    pairs_of_term: number of pairs of each term.
    group_of_pair: for each pair the index of its group in the batch.
    guidance_P2: [P, 2] int64, cells of the view that guides the policy, or None if no term is guided.
    weighed: token weights, or None if all are 1.
    second: second targets, or None.
    has_reference_N: [N] bool, tokens that the reference scores, or None for all.
    reference: [N] fp32 log-probs of the reference, 0 where it scores none, or None while they are being computed.
    """

    completion_of_token_N: torch.Tensor
    completion_starts_K1: torch.Tensor
    pairs_P2: torch.Tensor
    pair_weight_P: torch.Tensor
    pair_beta_P: torch.Tensor
    pairs_of_term: tuple[int, ...]
    group_of_pair: tuple[int, ...] = ()
    guidance_P2: torch.Tensor | None = None
    weighed: WeighedTokens | None = None
    second: SecondTargets | None = None
    has_reference_N: torch.Tensor | None = None
    reference: torch.Tensor | None = None

    @property
    def num_completions(self) -> int:
        return self.completion_starts_K1.numel() - 1

    def sequence_sum(self, value_N: torch.Tensor) -> torch.Tensor:
        """Sums a token quantity over each cell: [N] -> [K]."""
        return value_N.new_zeros(self.num_completions).index_add(0, self.completion_of_token_N, value_N)


@dataclass(frozen=True, slots=True)
class HeadRequest:
    """What a loss wants of the LM head in addition to log-probs.

    kernel: loss type and label smoothing of the terms that the kernels compute together with the head, or None.
    pairs: half-open ranges of the pairs of these terms.
    mean: whether sequences of these terms count as the mean of their tokens.
    collision: whether log sum_v p_v^2 of each row is needed.
    extrapolation: lambda of log-probs of logits extrapolated beyond the policy; 0 for none.
    """

    kernel: tuple[str, float] | None = None
    pairs: tuple[tuple[int, int], ...] = ()
    mean: bool = False
    collision: bool = False
    extrapolation: float = 0.0


@dataclass(frozen=True, slots=True)
class LostGroup:
    """A group that was usable when the run was planned and no longer is, such as one whose image has been replaced.

    index: its index in the dataset.
    """

    index: int
    group_id: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class GroupBatch:
    """Several groups packed into one row without padding: the unit of one forward pass.

    If the model cannot share prefixes, T counts the tokens of concatenated padded rows [prefix | completion];
    `sequence_inputs` then holds their attention mask [B, T / B].

    input_ids_T: token ids, image placeholders expanded.
    position_ids_XT: [1, T], or [3, T] for multimodal rotary positions; restart after the prefix for each completion.
    image_inputs: keyword arguments of the vision tower, the images of all groups in order.
    predictor_rows_N: the row of T whose hidden state predicts `target_N`.
    loss_inputs: tokens -> cells -> pairs, their weights and the reference. With second targets their N exceeds that of
        `target_N`, whose tokens come first.
    reference_keys: for each cell its key in the reference store, or "" if the reference does not score it.
    group_of_cell: for each cell the index of its group in `group_ids`.
    group_keys: for each group the key of its content, or empty if it was not measured.
    num_pairs: preference pairs of its groups, whatever the terms of the loss; 0 in a filler.
    is_filler: all pairs have weight 0; stored here so that no device read is needed.
    useful_work: the work that training needs; zero for fillers and stand-in images.
    sequence_inputs: further model inputs of B padded rows; empty for one packed row.
    feature_rows_F: for each image (or tile) in the rows, the entry of `pixel_values` with its features, if an image
        that occurs in several rows is encoded once; None if each occurrence has its own entry.
    image_keys: for each entry of the vision tower (`Family.entries`) the digest of its content; empty without digests.
    features: for each entry the inputs of the projector, stacked; empty if the tower is to run in the forward pass.
    lost: groups of the plan that the batch lacks.
    """

    group_ids: tuple[str, ...]
    layout: PackedLayout
    input_ids_T: torch.Tensor
    position_ids_XT: torch.Tensor
    image_inputs: dict[str, torch.Tensor]
    predictor_rows_N: torch.Tensor
    target_N: torch.Tensor
    loss_inputs: LossInputs
    reference_keys: tuple[str, ...] = field(default=())
    group_of_cell: tuple[int, ...] = ()
    group_keys: tuple[str, ...] = ()
    num_pairs: int = 0
    is_filler: bool = False
    useful_work: UsefulWork = field(default_factory=UsefulWork)
    sequence_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    feature_rows_F: torch.Tensor | None = None
    image_keys: tuple[str, ...] = ()
    features: tuple[torch.Tensor, ...] = ()
    lost: tuple[LostGroup, ...] = ()

    def pin_memory(self) -> GroupBatch:
        """The batch in page-locked memory, for asynchronous copies; called by a DataLoader with `pin_memory`."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device, dtype: torch.dtype) -> GroupBatch:
        """The batch on a device, pixels in `dtype`; asynchronous from page-locked memory to a GPU.

        Tensors already there are not copied. Pixels are converted on the device: `Tensor.to(device, dtype)` would
        convert them on the host first, into memory that is not page-locked.
        """
        moved = self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))
        pixels = {k: v.to(dtype) if v.is_floating_point() else v for k, v in moved.image_inputs.items()}
        return replace(moved, image_inputs=pixels)

    def with_reference(self, logp_N: torch.Tensor) -> GroupBatch:
        """The batch with the log-probs [N] of the reference."""
        return replace(self, loss_inputs=replace(self.loss_inputs, reference=logp_N))

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the batch."""
        return [
            *self.image_inputs.values(),
            *self.sequence_inputs.values(),
            *(tensor for record in self._records() for tensor in _tensor_fields(record).values()),
            *_tensor_fields(self).values(),
        ]

    def _changed_loss_inputs(self, changed: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> LossInputs:
        inputs = self.loss_inputs
        nested: dict[str, Any] = dict(changed(_tensor_fields(inputs)))
        for name in ("weighed", "second"):
            part: Any = getattr(inputs, name)
            if part is not None:
                nested[name] = replace(part, **changed(_tensor_fields(part)))
        return replace(inputs, **nested)

    def _records(self) -> list[LossInputs | WeighedTokens | SecondTargets]:
        inputs = self.loss_inputs
        return [record for record in (inputs, inputs.weighed, inputs.second) if record is not None]

    def _with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> GroupBatch:
        def changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: change(tensor) for name, tensor in tensors.items()}

        inputs: Any = {name: changed(getattr(self, name)) for name in ("image_inputs", "sequence_inputs")}
        loss_inputs = self._changed_loss_inputs(changed)
        return replace(self, **inputs, loss_inputs=loss_inputs, **changed(_tensor_fields(self)))  # type: ignore[arg-type]


def _tensor_fields(record: LossInputs | WeighedTokens | SecondTargets | GroupBatch) -> dict[str, torch.Tensor]:
    """Fields that hold a tensor, detected by a method: importing torch here would slow down every command."""
    values = {entry.name: getattr(record, entry.name) for entry in fields(record)}
    return {name: value for name, value in values.items() if hasattr(value, "pin_memory")}
