"""An LM head that returns log-probs or the preference loss, without logits of all rows in memory.

Shape letters: N response tokens, M second targets, H hidden size, P pairs, F pairs of fused terms.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from bpo.records import HeadRequest, LossInputs
from bpo_kernels.dispatch import linear_logprob, linear_preference_loss, second_target_logprob


class LogProbHead(torch.nn.Linear):
    """`nn.Linear` whose `forward(hidden, targets)` gives `log_softmax(hidden @ weight.T)[targets]` in fp32.

    With `inputs` and `request` it returns (losses [F], log-probs [N + M], collision [N], second targets [M]) from one
    GEMM of the head; what was not requested is None. Because it is a module, ZeRO-3 gathers its weight, tied weights
    stay tied and the state dict keeps its names. Without targets it is an ordinary linear layer, for generation.
    """

    def forward(  # type: ignore[override]
        self,
        hidden: torch.Tensor,
        target_N: torch.Tensor | None = None,
        inputs: LossInputs | None = None,
        request: HeadRequest | None = None,
    ) -> Any:
        if target_N is None:
            return F.linear(hidden, self.weight, self.bias)
        if inputs is not None and request is not None and request.kernel is not None:
            losses_F, logp_N = self._kernel_losses(hidden, target_N, inputs, request)
            return losses_F, logp_N, None, None
        # The reference pass uses the same GEMM as training: another one rounds differently, and the gap of the first
        # step's loss would no longer show whether policy and reference are identical.
        mode = "auto" if torch.is_grad_enabled() else "store"
        if inputs is None or request is None:
            return linear_logprob(hidden, self.weight, target_N, bias=self.bias, mode=mode)
        second = inputs.second
        statistics = request.collision or second is not None
        outputs = linear_logprob(hidden, self.weight, target_N, bias=self.bias, mode=mode, statistics=statistics)
        if not statistics:
            return None, outputs, None, None
        logp_N, _, argmax_N, collision_N = outputs
        if second is None:
            return None, logp_N, collision_N, None
        base_M = second.base_M
        token_M = argmax_N[second.source_M] if second.token_M is None else second.token_M
        logp_M = second_target_logprob(
            logp_N[base_M], hidden[base_M], self.weight, target_N[base_M], token_M, bias=self.bias
        )
        return None, torch.cat([logp_N, logp_M]), collision_N, token_M

    def _kernel_losses(
        self, hidden: torch.Tensor, target_N: torch.Tensor, inputs: LossInputs, request: HeadRequest
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [F], times the weights of the pairs, and log-probs [N]."""
        assert inputs.reference is not None and request.kernel is not None
        loss_type, label_smoothing = request.kernel
        token_weight_N = None
        if request.mean:
            token_weight_N = (1 / inputs.completion_starts_K1.diff())[inputs.completion_of_token_N]
        losses_F, _, _, logp_N = linear_preference_loss(
            hidden,
            self.weight,
            target_N,
            inputs.reference,
            inputs.completion_of_token_N,
            _ranges(inputs.pairs_P2, request.pairs),
            1.0,
            bias=self.bias,
            label_smoothing=label_smoothing,
            loss_type=loss_type,
            token_weight_N=token_weight_N,
            completion_starts_K1=inputs.completion_starts_K1,
            num_completions=inputs.num_completions,
            pair_beta_P=_ranges(inputs.pair_beta_P, request.pairs),
            pair_weight_P=_ranges(inputs.pair_weight_P, request.pairs),
        )
        return losses_F, logp_N


def _ranges(of_pairs: torch.Tensor, ranges: tuple[tuple[int, int], ...]) -> torch.Tensor:
    parts = [of_pairs[start:end] for start, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def install_logprob_head(model: torch.nn.Module) -> None:
    """Converts `model.lm_head` to a `LogProbHead` in place.

    Raises:
        ValueError: the head is not a plain linear layer (for example, it carries a LoRA adapter).
    """
    head = model.lm_head
    if type(head) is LogProbHead:
        return
    if type(head) is not torch.nn.Linear:
        raise ValueError(
            f"the LM head is a {type(head).__name__}, not torch.nn.Linear; its log-probs would be wrong. "
            "Remove the head from lora.target, or use a model with a plain linear head"
        )
    # Assigning the class keeps the parameter object, and with it tied embeddings and ZeRO-3 partitions.
    head.__class__ = LogProbHead
