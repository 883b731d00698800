"""Argument checks, precisions and chunk sizes, shared by all implementations of the operations.

Legend: N rows (response tokens), H hidden size, V vocabulary, K completions, P pairs, n rows of one chunk.

No function here reads values from a GPU: shapes, dtypes and devices are always checked, index ranges only of CPU
tensors (on CUDA that would synchronise; an out-of-range target gives NaN there, see README.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

LOSS_TYPES = ("sigmoid", "hinge", "ipo", "robust")
MODES = ("auto", "store", "fused", "recompute")
# Target of a masked row, as in torch.nn.functional.cross_entropy.
IGNORED_TARGET = -100
# Side of a pair that is the constant 0 instead of a completion.
ANCHOR = -1

# Maximum size of the logits of one chunk of rows. 2,048 rows of LLaVA's 32,064 tokens in fp32 take 250 MiB; on a GPU
# the rows of a whole micro-batch of Qwen2.5-VL (152,064 tokens) should fit, so that nothing is recomputed.
CPU_LOGITS_BUDGET_BYTES = 256 << 20
CUDA_LOGITS_BUDGET_BYTES = 2 << 30

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of log-probs and sums: fp64 for fp64 inputs (gradcheck), else fp32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def logits_budget(budget_bytes: int | None, device: torch.device) -> int:
    """`budget_bytes`, or the device's default if it is None."""
    if budget_bytes is not None:
        return budget_bytes
    return CUDA_LOGITS_BUDGET_BYTES if device.type == "cuda" else CPU_LOGITS_BUDGET_BYTES


def rows_per_chunk(num_rows: int, vocab: int, itemsize: int, budget_bytes: int | None, device: torch.device) -> int:
    """Rows whose logits, `itemsize` bytes each, fit `budget_bytes` (None: the device's default); at least 1.

    The rows are spread evenly over the chunks: a last chunk of three rows would waste a GEMM.
    """
    largest = max(1, logits_budget(budget_bytes, device) // (vocab * itemsize))
    num_chunks = max(1, -(-num_rows // largest))
    return max(1, -(-num_rows // num_chunks))


def autocast_hidden(hidden_NH: Tensor) -> Tensor:
    """`hidden` in autocast's dtype if autocast is enabled, as `torch.nn.functional.linear` would cast it."""
    kind = hidden_NH.device.type
    if hidden_NH.dtype is not torch.float64 and torch.is_autocast_enabled(kind):
        return hidden_NH.to(torch.get_autocast_dtype(kind))
    return hidden_NH


def align(index: Tensor) -> Tensor:
    """`index` itself, or a copy if its memory is not aligned to 16 bytes.

    Triton's vector loads of int64 read wrong values from a view such as `labels[1:]`.
    """
    return index if index.data_ptr() % 16 == 0 else index.clone()


def check_triton_dtype(name: str, tensor: Tensor) -> None:
    """Raises ValueError for fp64, which the Triton kernels would silently compute in fp32."""
    if tensor.dtype is torch.float64:
        raise ValueError(f"{name} is torch.float64: Triton computes in fp32, set BPO_KERNELS=plain for fp64")


def check_target(target_N: Tensor, num_rows: int, vocab: int, device: torch.device, name: str = "target_N") -> None:
    """Raises ValueError unless `target_N` has `num_rows` token ids in [0, vocab), or -100, on `device`."""
    if target_N.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} has dtype {target_N.dtype}: pass token ids as torch.int64")
    if target_N.shape != (num_rows,):
        raise ValueError(
            f"{name} has shape {tuple(target_N.shape)}, but there are {num_rows} rows: pass one target per row, "
            "flattened, and select the response rows before the call"
        )
    if target_N.device != device:
        raise ValueError(f"{name} is on {target_N.device}, the rows on {device}: move it there")
    if device.type != "cpu":
        return  # its values cannot be checked, and two kernels would be launched for nothing
    counted_N = target_N.where(target_N != IGNORED_TARGET, 0)
    check_index_range(name, counted_N, vocab, "pass token ids of this vocabulary, or -100 to mask a row")


def check_index_range(name: str, index: Tensor, size: int, fix: str, least: int = 0) -> None:
    """Raises ValueError if a CPU index tensor exceeds [least, size). Skipped on other devices and when compiling."""
    if index.device.type != "cpu" or torch.compiler.is_compiling() or index.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(index.reshape(-1)))
    if low < least or high >= size:
        raise ValueError(f"{name} holds {low if low < least else high}, outside [{least}, {size}): {fix}")


def _check_matrix(name: str, matrix: Tensor, letters: str) -> None:
    if matrix.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(matrix.shape)}, expected [{letters}]: flatten it")
    if matrix.dtype not in _FLOATS:
        raise ValueError(f"{name} has dtype {matrix.dtype}: use one of float16, bfloat16, float32, float64")


def check_logprob_gather(logits_NV: Tensor, target_N: Tensor, inplace_backward: bool) -> None:
    """Raises ValueError if `logprob_gather` does not accept these arguments."""
    _check_matrix("logits_NV", logits_NV, "N, V")
    num_rows, vocab = logits_NV.shape
    if vocab == 0:
        raise ValueError("logits_NV has no columns: the vocabulary is empty")
    check_target(target_N, num_rows, vocab, logits_NV.device)
    if inplace_backward and logits_NV.requires_grad and logits_NV.is_leaf:
        raise ValueError(
            "inplace_backward would overwrite logits_NV, a leaf whose values belong to the caller: pass the output of "
            "an operation, or disable inplace_backward"
        )
    if inplace_backward and 0 in logits_NV.stride() and num_rows > 1:
        raise ValueError(
            f"inplace_backward needs separate memory for every logit, logits_NV has strides {logits_NV.stride()}: "
            "call .contiguous(), or disable inplace_backward"
        )


def check_linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    mode: str,
    budget_bytes: int | None,
) -> None:
    """Raises ValueError if `linear_logprob` does not accept these arguments."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}: use one of {', '.join(MODES)}")
    _check_matrix("hidden_NH", hidden_NH, "N, H")
    if weight_VH.numel() == 0:
        raise ValueError(
            f"weight_VH has shape {tuple(weight_VH.shape)}, so it is empty: under ZeRO-3 call the operation "
            "inside the forward of the module that owns the weight, so that it is gathered"
        )
    _check_matrix("weight_VH", weight_VH, "V, H")
    vocab, hidden_size = weight_VH.shape
    if hidden_NH.shape[1] != hidden_size:
        raise ValueError(
            f"hidden_NH {tuple(hidden_NH.shape)} and weight_VH {tuple(weight_VH.shape)} differ in H: "
            "pass the weight as nn.Linear stores it, [V, H]"
        )
    for name, tensor in (("weight_VH", weight_VH), ("bias", bias_V)):
        if tensor is None:
            continue
        if tensor.device != hidden_NH.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden_NH on {hidden_NH.device}: move one of them")
        if tensor.dtype != hidden_NH.dtype and not torch.is_autocast_enabled(hidden_NH.device.type):
            raise ValueError(
                f"{name} is {tensor.dtype}, hidden_NH {hidden_NH.dtype}: cast one of them, or run under autocast"
            )
    if bias_V is not None and bias_V.shape != (vocab,):
        raise ValueError(f"bias has shape {tuple(bias_V.shape)}, expected ({vocab},): one per vocabulary entry")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}: use a positive number, or None for no cap")
    if budget_bytes is not None and budget_bytes <= 0:
        raise ValueError(f"budget_bytes is {budget_bytes}: use a positive number, or None for the default")
    check_target(target_N, hidden_NH.shape[0], vocab, hidden_NH.device)


def check_preference_options(beta: float, label_smoothing: float, loss_type: str) -> None:
    """Raises ValueError for an unknown loss or a coefficient out of range."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type is {loss_type!r}: use one of {', '.join(LOSS_TYPES)}")
    if not beta > 0:
        raise ValueError(f"beta is {beta}: use a positive number (the paper uses 0.1)")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}: it is the fraction of flipped pairs, use [0, 0.5)")
    if label_smoothing and loss_type not in ("sigmoid", "robust"):
        raise ValueError(
            f"label_smoothing is {label_smoothing} but loss_type {loss_type!r} has none: "
            "set 0, or use sigmoid or robust"
        )


def check_second_target(
    logp_N: Tensor,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    second_N: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
) -> None:
    """Raises ValueError if `second_target_logprob` does not accept these arguments."""
    check_linear_logprob(hidden_NH, weight_VH, target_N, bias_V, softcap, "auto", None)
    check_target(second_N, hidden_NH.shape[0], weight_VH.shape[0], hidden_NH.device, "second_N")
    if logp_N.shape != hidden_NH.shape[:1]:
        raise ValueError(
            f"logp_N has shape {tuple(logp_N.shape)}, but there are {hidden_NH.shape[0]} rows: pass the log-probs [N] "
            "that linear_logprob returned for these rows"
        )
    if logp_N.device != hidden_NH.device:
        raise ValueError(f"logp_N is on {logp_N.device}, hidden_NH on {hidden_NH.device}: move it there")
    expected = statistics_dtype(hidden_NH.dtype)
    if logp_N.dtype is not expected:
        raise ValueError(f"logp_N is {logp_N.dtype}, expected {expected}, which linear_logprob returns: do not cast it")


def check_preference_loss(
    policy_logp_N: Tensor,
    reference_logp_N: Tensor,
    completion_of_token_N: Tensor,
    pairs_P2: Tensor,
    token_weight_N: Tensor | None,
    num_completions: int | None,
    completion_starts_K1: Tensor | None = None,
    pair_beta_P: Tensor | None = None,
    pair_weight_P: Tensor | None = None,
) -> int:
    """Returns the number of completions; raises ValueError if `preference_loss` does not accept these tensors."""
    device, shape = policy_logp_N.device, policy_logp_N.shape
    if policy_logp_N.dim() != 1:
        raise ValueError(f"policy_logp_N has shape {tuple(shape)}, expected [N]: flatten it")
    for name, tensor, is_index, size, unit in (
        ("reference_logp_N", reference_logp_N, False, shape, "token"),
        ("completion_of_token_N", completion_of_token_N, True, shape, "token"),
        ("token_weight_N", token_weight_N, False, shape, "token"),
        ("pairs_P2", pairs_P2, True, None, ""),
        ("completion_starts_K1", completion_starts_K1, True, None, ""),
        ("pair_beta_P", pair_beta_P, False, pairs_P2.shape[:1], "pair"),
        ("pair_weight_P", pair_weight_P, False, pairs_P2.shape[:1], "pair"),
    ):
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, policy_logp_N on {device}: move it there")
        if size is not None and tensor.shape != size:
            of = f"policy_logp_N {tuple(shape)}" if unit == "token" else f"pairs_P2 {tuple(pairs_P2.shape)}"
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {of}: pass one per {unit}")
        allowed = (torch.int64, torch.int32) if is_index else _FLOATS
        if tensor.dtype not in allowed:
            raise ValueError(f"{name} has dtype {tensor.dtype}: use {'torch.int64' if is_index else 'a float type'}")
    if policy_logp_N.dtype not in _FLOATS:
        raise ValueError(f"policy_logp_N has dtype {policy_logp_N.dtype}: use a float type")
    if pairs_P2.dim() != 2 or pairs_P2.shape[1] != 2:
        raise ValueError(f"pairs_P2 has shape {tuple(pairs_P2.shape)}, expected [P, 2]: rows of (chosen, rejected)")
    num_completions = _check_completions(completion_of_token_N, pairs_P2, num_completions)
    if completion_starts_K1 is not None:
        _check_starts(completion_starts_K1, completion_of_token_N)
    if pair_beta_P is not None:
        _check_pair_beta(pair_beta_P)
    return num_completions


def _check_completions(completion_of_token_N: Tensor, pairs_P2: Tensor, num_completions: int | None) -> int:
    """Returns the number of completions; raises ValueError for an index outside them (a pair's side may be -1)."""
    if num_completions is None:
        highest = [int(index.max()) for index in (completion_of_token_N, pairs_P2) if index.numel()]
        num_completions = max(highest, default=-1) + 1
    elif num_completions < 0:
        raise ValueError(f"num_completions is {num_completions}: use the number of completions in the batch")
    fix = f"raise num_completions (now {num_completions}) or correct the index"
    check_index_range("completion_of_token_N", completion_of_token_N, num_completions, fix)
    check_index_range("pairs_P2", pairs_P2, num_completions, f"{fix}; -1 is the constant 0", ANCHOR)
    return num_completions


def _check_pair_beta(pair_beta_P: Tensor) -> None:
    """Raises ValueError for a factor that is not positive; checks values only on a CPU."""
    if pair_beta_P.device.type != "cpu" or torch.compiler.is_compiling() or pair_beta_P.numel() == 0:
        return
    if not bool((pair_beta_P > 0).all()):
        raise ValueError(f"pair_beta_P holds {pair_beta_P.min().item():g}: use positive factors of beta")


def _check_starts(starts_K1: Tensor, completion_of_token_N: Tensor) -> None:
    """Raises ValueError if the offsets do not match the tokens' completions; checks values only on a CPU."""
    if starts_K1.dim() != 1 or starts_K1.numel() == 0:
        raise ValueError(f"completion_starts_K1 has shape {tuple(starts_K1.shape)}, expected [K + 1]")
    if starts_K1.device.type != "cpu" or torch.compiler.is_compiling():
        return
    num_completions = starts_K1.numel() - 1
    expected_N = torch.repeat_interleave(torch.arange(num_completions), starts_K1.diff().clamp(min=0))
    if int(starts_K1[0]) != 0 or not torch.equal(expected_N, completion_of_token_N.long()):
        raise ValueError(
            "completion_starts_K1 does not divide the tokens as completion_of_token_N does: pass the offset of each "
            "completion's first token and N at the end, for completions in order, or None"
        )


def check_reference(
    reference: Tensor,
    reference_weight_VH: Tensor | None,
    reference_bias_V: Tensor | None,
    hidden_NH: Tensor,
    weight_VH: Tensor,
) -> None:
    """Raises ValueError unless `reference` is one log-prob per row, or hidden states with a matching head."""
    num_rows = hidden_NH.shape[0]
    if reference.device != hidden_NH.device:
        raise ValueError(f"reference is on {reference.device}, hidden_NH on {hidden_NH.device}: move it there")
    if reference.dtype not in _FLOATS:
        raise ValueError(f"reference has dtype {reference.dtype}: pass log-probs or hidden states of a float type")
    if reference.dim() == 1 and (reference_weight_VH is not None or reference_bias_V is not None):
        raise ValueError("reference is stored log-probs [N], but a head was passed for it: omit the head")
    if reference.dim() == 1 and reference.shape[0] == num_rows:
        return
    if reference.dim() != 2 or reference.shape[0] != num_rows:
        raise ValueError(
            f"reference has shape {tuple(reference.shape)}, but there are {num_rows} rows: pass stored log-probs [N] "
            "or the reference model's hidden states [N, H] of the same rows"
        )
    if reference_weight_VH is None and reference_bias_V is not None:
        raise ValueError(
            "reference_bias was passed without reference_weight_VH: pass both, or neither to share the head"
        )
    weight_VH = weight_VH if reference_weight_VH is None else reference_weight_VH
    if weight_VH.dim() != 2 or reference.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"reference {tuple(reference.shape)} does not match its head {tuple(weight_VH.shape)}: they differ in H"
        )
