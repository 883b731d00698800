"""Benchmark cases: shapes, inputs, true results, and formulas of work and memory.

Legend: N rows (response tokens), H hidden size, V vocabulary, K completions, P pairs, n rows of one chunk.

Rates are computed from the FLOPs and bytes that an operation *needs* (`needed_work`), the same for every provider, so
that a provider that does more work has a lower rate. `performed_gemms` and `formula_peak_bytes` give the actual work of
bpo's modes and eager PyTorch; tests/kernels/test_bench_formulas.py compares them with a profiler's counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 0.1
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LOGITS = ("random", "peaked")
VARIANTS = {
    "linear_logprob": ("forward", "frozen", "trained", "statistics"),
    "logprob_gather": ("gradient",),
    "preference_loss": ("gradient", "terms"),
    "linear_preference_loss": ("live-frozen", "live-trained", "stored-frozen"),
    "second_target_logprob": ("frozen", "trained"),
}
# Timed only if --variants names them: statistics of each row; pairs with their own beta and weight, and anchors.
ON_REQUEST = ("statistics", "terms")
OPERATIONS = tuple(VARIANTS)
# Files in tests/kernels: an operation is timed only after its tests pass.
TEST_FILES: dict[str, tuple[str, ...]] = {operation: (f"test_{operation}.py",) for operation in OPERATIONS}
TEST_FILES["linear_logprob"] += ("test_logprob_rows.py",)
TEST_FILES["preference_loss"] += ("test_preference_sizes.py",)
# Tokens per completion if there are enough rows for a pair.
TOKENS_PER_COMPLETION = 128
_TRUTH_CHUNK_ROWS = 256


@dataclass(frozen=True)
class Shape:
    """An LM head, and the number of prompt and image tokens before each completion in typical batches."""

    hidden_size: int
    vocab: int
    prompt_tokens: int


SHAPES = {
    "llava-1.5-7b": Shape(4096, 32064, 640),  # 576 of one 336-pixel image
    "qwen2.5-vl-7b": Shape(3584, 152064, 1300),
    "llama-3-8b": Shape(4096, 128256, 512),
    "smollm": Shape(576, 49152, 128),
    "tiny": Shape(64, 1031, 24),  # to test the benchmark itself
}


@dataclass(frozen=True)
class Case:
    """One benchmark: the same computation by each provider."""

    operation: str
    variant: str
    shape: str
    num_rows: int
    logits: str
    dtype: torch.dtype
    device: torch.device
    budget_bytes: int | None = None

    @property
    def head(self) -> Shape:
        return SHAPES[self.shape]

    @property
    def has_gradient(self) -> bool:
        return self.variant not in ("forward", "statistics")

    @property
    def trains_head(self) -> bool:
        return self.variant.endswith("trained")

    @property
    def has_head(self) -> bool:
        return self.operation.startswith("linear_")

    @property
    def has_pairs(self) -> bool:
        return self.operation.endswith("preference_loss")

    @property
    def tokens_per_completion(self) -> int:
        return min(TOKENS_PER_COMPLETION, max(1, self.num_rows // 2))

    @property
    def num_pairs(self) -> int:
        return self.num_rows // (2 * self.tokens_per_completion)

    @property
    def num_losses(self) -> int:
        """Pairs, and in `terms` as many again with an anchor in the place of the rejected completion."""
        return self.num_pairs * (2 if self.variant == "terms" else 1)

    @property
    def label(self) -> str:
        parts = (self.operation, self.variant, self.shape if self.operation != "preference_loss" else "")
        return " ".join(part for part in (*parts, f"N={self.num_rows}", self.logits) if part)

    def why_impossible(self) -> str | None:
        """The reason why this case is impossible, or None."""
        if self.has_pairs and (self.num_rows < 2 or self.num_rows % (2 * self.tokens_per_completion)):
            return (
                f"{self.num_rows} rows are not whole pairs: use an even number below {2 * TOKENS_PER_COMPLETION} "
                f"or a multiple of {2 * TOKENS_PER_COMPLETION}"
            )
        return None


@dataclass(frozen=True)
class Pairs:
    """Consecutive completions of equal length; pair i is (completion 2i, completion 2i + 1).

    With factors of each pair's beta and loss, the pairs (completion 2i, the constant 0) follow.
    """

    completion_N: Tensor
    starts_K1: Tensor
    pairs_P2: Tensor
    num_completions: int
    beta_P: Tensor | None = None
    weight_P: Tensor | None = None


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case; None for those that its operation does not use."""

    target_N: Tensor
    hidden_NH: Tensor | None = None
    weight_VH: Tensor | None = None
    logits_NV: Tensor | None = None
    policy_N: Tensor | None = None
    reference_N: Tensor | None = None
    reference_NH: Tensor | None = None
    pairs: Pairs | None = None
    second_N: Tensor | None = None

    def wanted(self) -> list[Tensor]:
        """Tensors that require a gradient, in the order of the fields."""
        candidates = (self.hidden_NH, self.weight_VH, self.logits_NV, self.policy_N)
        return [tensor for tensor in candidates if tensor is not None and tensor.requires_grad]


def make_cases(
    operation: str,
    shapes: list[str],
    rows: list[int],
    logits: list[str],
    dtype: torch.dtype,
    device: torch.device,
    budget_bytes: int | None = None,
    variants: list[str] | None = None,
) -> list[Case]:
    """All combinations; preference_loss has neither head nor logits, so it has one case per number of rows.

    `variants` selects variants of the operation; None selects all but those of ON_REQUEST.
    """
    if operation == "preference_loss":
        shapes, logits, dtype = shapes[:1], ["random"], torch.float32
    return [
        Case(operation, variant, shape, num_rows, kind, dtype, device, budget_bytes)
        for shape in shapes
        for num_rows in rows
        for variant in VARIANTS[operation]
        if (variant not in ON_REQUEST if variants is None else variant in variants)
        for kind in logits
    ]


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Inputs of a case, the same for the same seed.

    `random`: logits of standard deviation 1 and random targets, a flat softmax. `peaked`: the target's logit is raised
    to a probability of 0.45 on average, with most tokens nearly certain or rather unlikely, as in a trained model. The
    gain and the error of a provider that skips small probabilities show only there.
    """
    generator = torch.Generator(case.device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=case.device, dtype=dtype)

    pairs = _make_pairs(case, generator) if case.has_pairs else None
    num_rows, head = case.num_rows, case.head
    target_N = torch.randint(head.vocab, (num_rows,), generator=generator, device=case.device)
    if case.operation == "preference_loss":
        policy_N = (-2 * normal(num_rows).abs()).requires_grad_()
        return Inputs(target_N, policy_N=policy_N, reference_N=policy_N.detach() + 0.1 * normal(num_rows), pairs=pairs)
    # Relative to V logits of variance 1, whose log-sum is log V + 1/2, the target's is raised by this plus noise.
    raise_N1 = (math.log(head.vocab) + 0.5 - 0.43 + 3.0 * normal(num_rows, 1)) * (case.logits == "peaked")
    if case.operation == "logprob_gather":
        logits_NV = normal(num_rows, head.vocab, dtype=case.dtype)
        logits_NV.scatter_add_(1, target_N[:, None], raise_N1.to(case.dtype))
        return Inputs(target_N, logits_NV=logits_NV.requires_grad_())
    weight_VH = normal(head.vocab, head.hidden_size, dtype=case.dtype).mul_(head.hidden_size**-0.5)
    hidden_NH = normal(num_rows, head.hidden_size) + raise_N1 * weight_VH[target_N].float()
    reference_NH = reference_N = second_N = None
    logp_N: Tensor | None = None
    if case.operation == "second_target_logprob":
        logp_N = (-2 * normal(num_rows).abs()).requires_grad_()
        second_N = torch.randint(head.vocab, (num_rows,), generator=generator, device=case.device)
    if case.has_pairs:
        reference_NH = (hidden_NH + 0.05 * normal(num_rows, head.hidden_size)).to(case.dtype)
        if case.variant.startswith("stored"):
            reference_N, _, _ = _true_head(reference_NH, weight_VH, target_N, None, False)
            reference_NH = None
    return Inputs(
        target_N,
        hidden_NH=hidden_NH.to(case.dtype).requires_grad_(case.has_gradient),
        weight_VH=weight_VH.requires_grad_(case.trains_head),
        reference_N=reference_N,
        reference_NH=reference_NH,
        policy_N=logp_N,
        pairs=pairs,
        second_N=second_N,
    )


def _make_pairs(case: Case, generator: torch.Generator) -> Pairs:
    num_completions = 2 * case.num_pairs
    order = torch.arange(num_completions + 1, device=case.device)
    pairs_P2 = order[:-1].view(-1, 2)
    factors: tuple[Tensor, ...] = ()
    if case.variant == "terms":
        pairs_P2 = torch.cat([pairs_P2, torch.stack([pairs_P2[:, 0], torch.full_like(pairs_P2[:, 0], -1)], dim=1)])
        factors = (0.5 + torch.rand(2, case.num_losses, generator=generator, device=case.device)).unbind(0)
    completion_N = order[:-1].repeat_interleave(case.tokens_per_completion)
    return Pairs(completion_N, order * case.tokens_per_completion, pairs_P2, num_completions, *factors)


def pair_losses(policy_N: Tensor, reference_N: Tensor, pairs: Pairs) -> Tensor:
    """DPO losses [P] (arXiv 2305.18290 eq. 7) in plain PyTorch."""
    ratio_K = policy_N.new_zeros(pairs.num_completions).index_add(0, pairs.completion_N, policy_N - reference_N)
    if pairs.beta_P is None or pairs.weight_P is None:
        return -F.logsigmoid(BETA * (ratio_K[pairs.pairs_P2[:, 0]] - ratio_K[pairs.pairs_P2[:, 1]]))
    chosen_P, rejected_P = F.pad(ratio_K, (0, 1))[pairs.pairs_P2].unbind(1)
    return -pairs.weight_P * F.logsigmoid(BETA * pairs.beta_P * (chosen_P - rejected_P))


def row_statistics(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """Negative log-probs, entropies and log collision probabilities [3, N] in plain PyTorch."""
    logp_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    nll_N = -logp_NV.gather(1, target_N[:, None])[:, 0]
    return torch.stack([nll_N, -(logp_NV.exp() * logp_NV).sum(-1), (2 * logp_NV).logsumexp(-1)])


def second_nll(logp_N: Tensor, hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor, second_N: Tensor) -> Tensor:
    """Negative log-probs [N] of the second targets in plain PyTorch."""
    move_NH = weight_VH[second_N].float() - weight_VH[target_N].float()
    return -(logp_N + (hidden_NH.float() * move_NH).sum(-1))


def objective_weight(case: Case) -> float:
    """Weight of each value in the differentiated scalar: a sum over tokens, a mean over pairs."""
    return 1.0 / case.num_losses if case.has_pairs else 1.0


def true_result(case: Case, inputs: Inputs) -> list[Tensor]:
    """The values (negative log-probs [N], or losses [P]) and the gradients of `Inputs.wanted`, all computed in fp32."""
    if case.operation == "preference_loss":
        assert inputs.policy_N is not None and inputs.reference_N is not None and inputs.pairs is not None
        losses_P = pair_losses(inputs.policy_N, inputs.reference_N, inputs.pairs)
        return [losses_P.detach(), *torch.autograd.grad(losses_P.mean(), [inputs.policy_N])]
    if case.operation == "logprob_gather":
        assert inputs.logits_NV is not None
        leaf_NV = inputs.logits_NV.detach().float().requires_grad_()
        nll_N = F.cross_entropy(leaf_NV, inputs.target_N, reduction="none")
        return [nll_N.detach(), *torch.autograd.grad(nll_N.sum(), [leaf_NV])]
    assert inputs.hidden_NH is not None and inputs.weight_VH is not None
    hidden_NH, weight_VH = inputs.hidden_NH.detach(), inputs.weight_VH.detach()
    if case.variant == "statistics":
        chunks = zip(hidden_NH.split(_TRUTH_CHUNK_ROWS), inputs.target_N.split(_TRUTH_CHUNK_ROWS), strict=True)
        return [torch.cat([row_statistics(part_nH.float() @ weight_VH.float().t(), n) for part_nH, n in chunks], dim=1)]
    if inputs.second_N is not None:
        assert inputs.policy_N is not None
        hidden_NH, weight_VH, logp_N = (
            leaf.detach().float().requires_grad_() for leaf in (hidden_NH, weight_VH, inputs.policy_N)
        )
        nll_N = second_nll(logp_N, hidden_NH, weight_VH, inputs.target_N, inputs.second_N)
        wanted = [hidden_NH, weight_VH, logp_N] if case.trains_head else [hidden_NH, logp_N]
        return [nll_N.detach(), *torch.autograd.grad(nll_N.sum(), wanted)]
    if not case.has_pairs:
        ones_N = torch.ones_like(inputs.target_N, dtype=torch.float32) if case.has_gradient else None
        logp_N, *grads = _true_head(hidden_NH, weight_VH, inputs.target_N, ones_N, case.trains_head)
        return [-logp_N, *(-grad for grad in grads if grad is not None)]
    assert inputs.pairs is not None
    policy_N, _, _ = _true_head(hidden_NH, weight_VH, inputs.target_N, None, False)
    reference_N = inputs.reference_N
    if reference_N is None:
        assert inputs.reference_NH is not None
        reference_N, _, _ = _true_head(inputs.reference_NH, weight_VH, inputs.target_N, None, False)
    losses_P = pair_losses(policy_N.requires_grad_(), reference_N, inputs.pairs)
    (coefficient_N,) = torch.autograd.grad(losses_P.mean(), [policy_N])
    _, *grads = _true_head(hidden_NH, weight_VH, inputs.target_N, coefficient_N, case.trains_head)
    return [losses_P.detach(), *(grad for grad in grads if grad is not None)]


def _true_head(
    hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor, coefficient_N: Tensor | None, trains_head: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probs in fp32 and, given d objective / d log-prob, the gradients of hidden states and weight."""
    leaf_VH = weight_VH.detach().float().requires_grad_(trains_head and coefficient_N is not None)
    logps, hidden_grads, weight_grad_VH = [], [], None
    for start in range(0, hidden_NH.shape[0], _TRUTH_CHUNK_ROWS):
        chunk = slice(start, start + _TRUTH_CHUNK_ROWS)
        leaf_nH = hidden_NH[chunk].detach().float().requires_grad_(coefficient_N is not None)
        logp_n = -F.cross_entropy(leaf_nH @ leaf_VH.t(), target_N[chunk], reduction="none")
        logps.append(logp_n.detach())
        if coefficient_N is None:
            continue
        leaves = [leaf_nH, leaf_VH] if leaf_VH.requires_grad else [leaf_nH]
        grad_nH, *rest = torch.autograd.grad(logp_n, leaves, coefficient_N[chunk])
        hidden_grads.append(grad_nH)
        if rest:
            weight_grad_VH = rest[0] if weight_grad_VH is None else weight_grad_VH.add_(rest[0])
    return torch.cat(logps), torch.cat(hidden_grads) if hidden_grads else None, weight_grad_VH


def needed_work(case: Case) -> tuple[int, int]:
    """Minimum FLOPs and bytes of a case: inputs read once per pass, outputs written once.

    linear_logprob          2NVH for the logits and for each gradient: of hidden states and of a trained head
    linear_preference_loss  the same, and 2NVH for the logits of a live reference
    logprob_gather          one read of the logits forward, one read and one write backward
    preference_loss         policy and reference forward, gradient backward, offsets and pairs in both;
                            factors of pairs forward
    second_target_logprob   hidden states and two rows of the weight per row forward; these rows and the gradient of the
                            hidden states backward; for a trained head the hidden states again and [V, H]
    """
    num_rows, head, itemsize = case.num_rows, case.head, case.dtype.itemsize
    if case.has_head:
        gemms = 1 + case.has_gradient + case.trains_head + case.variant.startswith("live")
        gemm_bytes = (head.vocab + num_rows) * head.hidden_size * itemsize
        return gemms * gemm_flops(case), gemms * gemm_bytes
    if case.operation == "logprob_gather":
        return 0, 3 * num_rows * head.vocab * itemsize
    if case.operation == "second_target_logprob":
        row_bytes = head.hidden_size * itemsize
        # Both targets, both slopes, log-prob or its gradient, in both directions.
        entries = num_rows * (2 * (2 * 8 + 2 * 4) + 2 * 4 + 2 * 4)
        return 0, (6 * num_rows + case.trains_head * (num_rows + head.vocab)) * row_bytes + entries
    num_completions, factors = 2 * case.num_pairs, 8 if case.variant == "terms" else 0
    return 0, num_rows * (4 + 4 + 4) + 2 * (num_completions + 1) * 8 + case.num_losses * (2 * 16 + 4 * 4 + factors)


def gemm_flops(case: Case) -> int:
    """FLOPs of one GEMM between rows and head."""
    return 2 * case.num_rows * case.head.vocab * case.head.hidden_size


def performed_gemms(case: Case, mode: str) -> int:
    """GEMMs of 2NVH that `mode` performs: eager, store, fused or recompute; `store` if the budget allows it."""
    needed = needed_work(case)[0] // gemm_flops(case)
    return needed + (mode in ("fused", "recompute") and case.has_gradient)


def formula_peak_bytes(case: Case, mode: str, chunk_rows: int) -> int:
    """Peak memory of linear_logprob in fp32 in addition to its inputs, ignoring less than a row of logits.

    eager      the log-softmax, its gradient and that of the logits; or the last with the weight's gradient
    store      frozen: a chunk of logits, which becomes D, and D @ W (twice while a coefficient scales it);
               trained: D of all rows, then the gradients
    recompute  a chunk of logits, then the gradients; the weight's is accumulated in tiles of 16 MiB
    """
    head = case.head
    row, hidden_bytes = 4 * head.vocab, 4 * case.num_rows * head.hidden_size
    weight_bytes = 4 * head.vocab * head.hidden_size
    if mode == "eager":
        if not case.has_gradient:
            return 2 * case.num_rows * row
        trained = case.num_rows * row + hidden_bytes + weight_bytes if case.trains_head else 0
        return max(3 * case.num_rows * row, trained)
    if not case.has_gradient:
        return chunk_rows * row
    if mode == "store" and not case.trains_head:
        return max(chunk_rows * row + hidden_bytes, 2 * hidden_bytes)
    if not case.trains_head:
        return chunk_rows * row + hidden_bytes
    scaled = 4 * chunk_rows * head.hidden_size
    if mode == "store":
        return case.num_rows * row + hidden_bytes + scaled + weight_bytes
    return chunk_rows * row + hidden_bytes + scaled + weight_bytes + min(weight_bytes, 16 << 20)
