"""The LM head as a module that returns log-probs of given tokens, never logits of the whole vocabulary for all rows.

Shape letters: N response tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bpo_kernels.dispatch import linear_logprob


class LogProbHead(torch.nn.Linear):
    """`nn.Linear` whose `forward(hidden, targets)` gives `log_softmax(hidden @ weight.T)[targets]` in fp32.

    Being a module, ZeRO-3 gathers its weight as for any other, tied weights stay tied and the state dict keeps its
    names. Without targets it is the ordinary linear layer, for generation.
    """

    def forward(self, hidden: torch.Tensor, target_N: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        if target_N is None:
            return F.linear(hidden, self.weight, self.bias)
        return linear_logprob(hidden, self.weight, target_N, bias=self.bias)


def install_logprob_head(model: torch.nn.Module) -> None:
    """Turns `model.lm_head` into a `LogProbHead` in place.

    Raises:
        ValueError: the head is not a plain linear layer (for example, it carries a LoRA adapter).
    """
    head = model.lm_head
    if type(head) is LogProbHead:
        return
    if type(head) is not torch.nn.Linear:
        raise ValueError(
            f"the LM head is a {type(head).__name__}, not torch.nn.Linear; its log-probs would be wrong. "
            "Leave the head out of lora.target, or use a model with a plain linear head"
        )
    # Assigning the class keeps the parameter object itself: tied embeddings and ZeRO-3 partitions stay as they are.
    head.__class__ = LogProbHead
