"""An LM head that returns log-probs or the preference loss, without logits of all rows in memory.

Shape letters: N response tokens, H hidden size, P pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bpo.config.training import LossConfig
from bpo.records import LossInputs
from bpo_kernels.dispatch import linear_logprob, linear_preference_loss


class LogProbHead(torch.nn.Linear):
    """`nn.Linear` whose `forward(hidden, targets)` gives `log_softmax(hidden @ weight.T)[targets]` in fp32.

    With a loss that the kernels implement, it returns losses [P], rewards of both sides [P] and log-probs [N] from one
    autograd function. Because it is a module, ZeRO-3 gathers its weight, tied weights stay tied and the state dict
    keeps its names. Without targets it is an ordinary linear layer, for generation.
    """

    def forward(  # type: ignore[override]
        self,
        hidden: torch.Tensor,
        target_N: torch.Tensor | None = None,
        inputs: LossInputs | None = None,
        loss: LossConfig | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        if target_N is None:
            return F.linear(hidden, self.weight, self.bias)
        if inputs is None or loss is None:
            # The reference pass uses the same GEMM as training: another one rounds differently, and the gap of the
            # first step's loss would no longer show whether policy and reference are identical.
            mode = "auto" if torch.is_grad_enabled() else "store"
            return linear_logprob(hidden, self.weight, target_N, bias=self.bias, mode=mode)
        assert inputs.reference is not None
        return linear_preference_loss(
            hidden,
            self.weight,
            target_N,
            inputs.reference,
            inputs.completion_of_token_N,
            inputs.pairs_P2,
            loss.beta,
            bias=self.bias,
            label_smoothing=loss.label_smoothing,
            loss_type=loss.type,
            token_weight_N=inputs.token_weight_N,
            completion_starts_K1=inputs.completion_starts_K1,
            num_completions=inputs.num_completions,
        )


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
