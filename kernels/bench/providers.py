"""Implementations of each operation: bpo in each mode, PyTorch in three ways, and the libraries of extra `bench`.

Legend: N rows (response tokens), H hidden size, V vocabulary, P pairs, S sequences of a padded batch, T their length.

A provider is built once per case and returns a step: forward, and backward if the case has a gradient, returning the
values (negative log-probs [N] or losses [P], or their sum or mean as one number) and the gradients of `Inputs.wanted`.
A library is imported when its provider is built; if it cannot run, it raises `Unavailable`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import chunks, dispatch
from .cases import BETA, Case, Inputs, objective_weight, pair_losses, row_statistics, second_nll

Step = Callable[[], list[Tensor]]
Builder = Callable[[Case, Inputs], Step]

MODES = ("store", "fused", "recompute")
OURS = ("bpo", *(f"bpo-{mode}" for mode in MODES), "bpo-overlap")
DISTRIBUTIONS = {"liger": "liger-kernel", "liger-dpo": "liger-kernel", "cce": "cut-cross-entropy"}
DISTRIBUTIONS |= {"quack": "quack-kernels", "trl-chunked": "trl"}
# Vocabulary columns per chunk in TRL's trainers (trl 1.16, trainer/utils.py).
TRL_CHUNK_COLUMNS = 32768


class Unavailable(RuntimeError):
    """A provider that cannot run here; the message gives the reason."""


def _module(name: str, provider: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        distribution = DISTRIBUTIONS[provider]
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            raise Unavailable(f"{distribution} is not installed: pip install 'bpo[bench]'") from error
        raise Unavailable(f"{distribution} {version} cannot be imported: {error}") from error


def _need_cuda(case: Case, *, capability: tuple[int, int] = (0, 0)) -> None:
    if case.device.type != "cuda":
        raise Unavailable("needs CUDA")
    found = torch.cuda.get_device_capability(case.device)
    if found < capability:
        raise Unavailable(
            f"needs compute capability {capability[0]}.{capability[1]}, this GPU has {found[0]}.{found[1]}"
        )


def version_of(provider: str) -> str | None:
    """Installed version of a provider's library; None for bpo's and PyTorch's providers, or if it is missing."""
    try:
        return importlib.metadata.version(DISTRIBUTIONS[provider]) if provider in DISTRIBUTIONS else None
    except importlib.metadata.PackageNotFoundError:
        return None


def _step(case: Case, inputs: Inputs, forward: Callable[[], Tensor]) -> Step:
    """`forward` and, if the case has one, the gradient of the sum (tokens) or mean (pairs) of its values."""
    if not case.has_gradient:
        return torch.no_grad()(lambda: [forward()])
    wanted = inputs.wanted()

    def step() -> list[Tensor]:
        values = forward()
        # A single number is already weighted by the provider.
        weight = objective_weight(case) if values.dim() else 1.0
        return [values.detach(), *torch.autograd.grad(values, wanted, torch.full_like(values, weight))]

    return step


def _ours(case: Case, inputs: Inputs, mode: str = "auto") -> Step:
    pairs = inputs.pairs
    reference = inputs.reference_N if inputs.reference_NH is None else inputs.reference_NH
    tensors: tuple[Tensor | None, ...] = (inputs.hidden_NH, inputs.weight_VH, inputs.target_N)
    options: dict[str, object] = {"mode": mode, "budget_bytes": case.budget_bytes}
    if case.operation == "logprob_gather":
        tensors, options = (inputs.logits_NV, inputs.target_N), {}
    elif case.operation == "preference_loss":
        tensors, options = (inputs.policy_N,), {}
    elif case.operation == "second_target_logprob":
        tensors, options = (inputs.policy_N, *tensors, inputs.second_N), {}
    elif case.variant == "statistics":
        options["statistics"] = True
    arguments: tuple[Tensor | float | None, ...] = tensors
    if pairs is not None:
        arguments = (*tensors, reference, pairs.completion_N, pairs.pairs_P2, BETA)
        options |= {"num_completions": pairs.num_completions, "completion_starts_K1": pairs.starts_K1}
        options |= {"pair_beta_P": pairs.beta_P, "pair_weight_P": pairs.weight_P}
    # Looked up at call time, so that tests can replace it.
    operation = getattr(dispatch, case.operation)

    def forward() -> Tensor:
        outputs = operation(*arguments, **options)
        if case.variant == "statistics":
            return torch.stack([-outputs[0], outputs[1], outputs[3]])
        return outputs[0] if case.has_pairs else -outputs

    return _step(case, inputs, forward)


def _overlapped(case: Case, inputs: Inputs) -> Step:
    """Mode `auto` with the row kernels on a second stream, if there are enough rows for several chunks."""
    _need_cuda(case)
    if not chunks.can_overlap(case.dtype, case.device):
        raise Unavailable(f"chunks overlap only in half precision, not in {case.dtype}")
    step = _ours(case, inputs)

    def switched_on() -> list[Tensor]:
        earlier = os.environ.get(chunks.ENVIRONMENT_VARIABLE)
        os.environ[chunks.ENVIRONMENT_VARIABLE] = "1"
        try:
            return step()
        finally:
            del os.environ[chunks.ENVIRONMENT_VARIABLE]
            if earlier is not None:
                os.environ[chunks.ENVIRONMENT_VARIABLE] = earlier

    return switched_on


def _eager_nll(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    return -torch.log_softmax(logits_NV.float(), dim=-1).gather(1, target_N[:, None])[:, 0]


def _eager_forward(case: Case, inputs: Inputs) -> Tensor:
    """Plain PyTorch code with fp32 log-softmax, on the response rows only."""
    if case.operation == "preference_loss":
        assert inputs.policy_N is not None and inputs.reference_N is not None and inputs.pairs is not None
        return pair_losses(inputs.policy_N, inputs.reference_N, inputs.pairs)
    if case.operation == "logprob_gather":
        assert inputs.logits_NV is not None
        return _eager_nll(inputs.logits_NV, inputs.target_N)
    assert inputs.hidden_NH is not None and inputs.weight_VH is not None
    if inputs.second_N is not None:
        assert inputs.policy_N is not None
        return second_nll(inputs.policy_N, inputs.hidden_NH, inputs.weight_VH, inputs.target_N, inputs.second_N)
    logits_NV = F.linear(inputs.hidden_NH, inputs.weight_VH)
    if case.variant == "statistics":
        return row_statistics(logits_NV, inputs.target_N)
    nll_N = _eager_nll(logits_NV, inputs.target_N)
    if not case.has_pairs:
        return nll_N
    assert inputs.pairs is not None
    reference_N = inputs.reference_N
    if reference_N is None:
        assert inputs.reference_NH is not None
        with torch.no_grad():
            reference_N = -_eager_nll(F.linear(inputs.reference_NH, inputs.weight_VH), inputs.target_N)
    return pair_losses(-nll_N, reference_N, inputs.pairs)


def _eager(case: Case, inputs: Inputs) -> Step:
    return _step(case, inputs, functools.partial(_eager_forward, case, inputs))


def _compiled(case: Case, inputs: Inputs) -> Step:
    # Each case has its own shapes: without a reset, later ones would reach the recompilation limit and run eagerly.
    torch._dynamo.reset()
    return _step(case, inputs, functools.partial(torch.compile(_eager_forward, dynamic=False), case, inputs))


def _torch_chunked(case: Case, inputs: Inputs) -> Step:
    operation = getattr(F, "linear_cross_entropy", None)
    if operation is None:
        raise Unavailable(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy: use 2.13")
    # The sum, whose gradients are computed in the forward; reduction="none" recomputes the logits.
    options = torch.nn.LinearCrossEntropyOptions()
    arguments = (inputs.hidden_NH, inputs.weight_VH, inputs.target_N)
    return _step(case, inputs, functools.partial(operation, *arguments, reduction="sum", options=options))


def _liger(case: Case, inputs: Inputs) -> Step:
    _need_cuda(case)
    operation = _module("liger_kernel.transformers.functional", "liger").liger_fused_linear_cross_entropy
    arguments = (inputs.hidden_NH, inputs.weight_VH, inputs.target_N)
    return _step(case, inputs, functools.partial(operation, *arguments, reduction="sum"))


def _cce(case: Case, inputs: Inputs) -> Step:
    _need_cuda(case)
    operation = _module("cut_cross_entropy", "cce").linear_cross_entropy
    arguments = (inputs.hidden_NH, inputs.weight_VH, inputs.target_N)
    return _step(case, inputs, functools.partial(operation, *arguments, reduction="none"))


def _quack(case: Case, inputs: Inputs) -> Step:
    _need_cuda(case, capability=(9, 0))
    if case.dtype not in (torch.bfloat16, torch.float16):
        raise Unavailable(f"supports bf16 and fp16, not {case.dtype}")
    if case.num_rows % 8 or case.head.vocab % 8 or case.head.hidden_size % 8:
        raise Unavailable(f"needs N, V and H to be multiples of 8, here {case.num_rows} x {case.head}")
    module = _module("quack.linear_cross_entropy", "quack")
    hidden_NH, weight_VH, target_N = inputs.hidden_NH, inputs.weight_VH, inputs.target_N
    # Before 0.6.2 the chunked function also computes the gradient of a frozen head; QuACK's other function does not.
    leaves_out = "need_dw" in inspect.signature(module.chunked_linear_cross_entropy_fwd).parameters
    if case.trains_head or leaves_out:
        chunked = functools.partial(module.chunked_linear_cross_entropy, hidden_NH, weight_VH, target_N)
        return _step(case, inputs, functools.partial(chunked, reduction="sum"))
    whole = functools.partial(module.linear_cross_entropy_func, hidden_NH, weight_VH, None, target_N)
    return _step(case, inputs, functools.partial(whole, reduction="sum", inplace_backward=True))


def _provide_trl_utils() -> None:
    """Lets the backward pass of TRL's function run without pandas and datasets.

    It imports a context that gathers a ZeRO-3 weight from a module that needs both; here the weight is not partitioned.
    """
    name = "trl.trainer.utils"
    try:
        importlib.import_module(name)
    except ImportError:
        utils = ModuleType(name)
        utils.__dict__["maybe_gather_lm_head_ctx"] = lambda *weights: contextlib.nullcontext()
        sys.modules[name] = utils


def _trl_chunked(case: Case, inputs: Inputs) -> Step:
    """The log-prob function of TRL's trainers; for pairs, on policy and reference in turn, as DPOTrainer calls it."""
    operation = _module("trl.kernels", "trl-chunked").ChunkedLogProbFunction
    _provide_trl_utils()

    def logp_of(hidden_NH: Tensor) -> Tensor:
        arguments = (hidden_NH, inputs.weight_VH, None, inputs.target_N, 1.0, TRL_CHUNK_COLUMNS)
        return operation.apply(*arguments, None, 1.0, ("log_probs",))[0]

    def forward() -> Tensor:
        assert inputs.hidden_NH is not None
        logp_N = logp_of(inputs.hidden_NH)
        if inputs.pairs is None:
            return -logp_N
        reference_N = inputs.reference_N
        if reference_N is None:
            assert inputs.reference_NH is not None
            with torch.no_grad():
                reference_N = logp_of(inputs.reference_NH)
        return pair_losses(logp_N, reference_N, inputs.pairs)

    return _step(case, inputs, forward)


def _padded(case: Case, rows_NH: Tensor, prompt_value: Tensor) -> Tensor:
    """[N, ...] rows as [S, prompt + completion, ...]: all chosen sequences, then all rejected ones, as in Liger."""
    sequences = rows_NH.unflatten(0, (2 * case.num_pairs, case.tokens_per_completion))
    prompt = prompt_value.expand(2 * case.num_pairs, case.head.prompt_tokens, *rows_NH.shape[1:])
    whole = torch.cat([prompt, sequences], dim=1)
    return torch.cat([whole[0::2], whole[1::2]])


def _liger_dpo(case: Case, inputs: Inputs) -> Step:
    """Liger's fused DPO on the same pairs. It takes whole sequences, so prompt rows also go through the head."""
    if inputs.reference_NH is None:
        raise Unavailable("has no stored reference: it takes the reference's hidden states")
    operation = _module("liger_kernel.chunked_loss", "liger-dpo").LigerFusedLinearDPOLoss
    # It compiles by default, which takes minutes; on a CPU only FLOPs and bytes are of interest.
    # `forward` itself, because FlopCounterMode's hooks on module calls do not support autograd.grad of a leaf.
    loss = operation(beta=BETA, compiled=case.device.type == "cuda").forward
    assert inputs.hidden_NH is not None and inputs.weight_VH is not None
    weight_VH = inputs.weight_VH
    zero = torch.zeros(1, 1, 1, dtype=case.dtype, device=case.device)
    hidden_STH = _padded(case, inputs.hidden_NH.detach(), zero).requires_grad_()
    reference_STH = _padded(case, inputs.reference_NH, zero)
    target_ST = _padded(case, inputs.target_N, zero[0].long() - 100)
    wanted = [hidden_STH, inputs.weight_VH] if case.trains_head else [hidden_STH]

    def step() -> list[Tensor]:
        value, _ = loss(weight_VH, hidden_STH, target_ST, ref_input=reference_STH, ref_weight=weight_VH.detach())
        grad_STH, *rest = torch.autograd.grad(value, wanted)
        response_STH = grad_STH[:, case.head.prompt_tokens :]
        chosen, rejected = response_STH.chunk(2)
        return [value.detach(), torch.stack([chosen, rejected], dim=1).flatten(0, 2), *rest]

    return step


def _log_probs_only(build: Builder) -> Builder:
    """`build`, for a library without statistics of the rows."""

    def checked(case: Case, inputs: Inputs) -> Step:
        if case.variant == "statistics":
            raise Unavailable("returns log-probs only")
        return build(case, inputs)

    return checked


_LIBRARIES: dict[str, Builder] = {
    "torch-chunked": _torch_chunked,
    "liger": _liger,
    "cce": _cce,
    "trl-chunked": _trl_chunked,
    "quack": _quack,
}
_PYTORCH: dict[str, Builder] = {"eager": _eager, "compile": _compiled}
_MODES: dict[str, Builder] = {f"bpo-{mode}": functools.partial(_ours, mode=mode) for mode in MODES}
_MODES["bpo-overlap"] = _overlapped
PROVIDERS: dict[str, dict[str, Builder]] = {
    "linear_logprob": {
        "bpo": _ours,
        **_MODES,
        **_PYTORCH,
        **{name: _log_probs_only(build) for name, build in _LIBRARIES.items()},
    },
    "logprob_gather": {"bpo": _ours, **_PYTORCH},
    "preference_loss": {"bpo": _ours, **_PYTORCH},
    "linear_preference_loss": {
        "bpo": _ours,
        **_MODES,
        **_PYTORCH,
        "trl-chunked": _trl_chunked,
        "liger-dpo": _liger_dpo,
    },
    "second_target_logprob": {"bpo": _ours, **_PYTORCH},
}
PROVIDER_NAMES = tuple(dict.fromkeys(name for table in PROVIDERS.values() for name in table))
