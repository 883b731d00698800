"""One forward pass over a packed batch: token ids and images in, log-probs of the response tokens out.

Shape letters: T packed tokens, N response tokens, D hidden size, X position channels (1 or 3).
"""

from __future__ import annotations

from typing import Any

import torch

from bpo.model.logprob_head import PreferenceTerms, install_logprob_head
from bpo.records import GroupBatch


class PolicyModel(torch.nn.Module):
    """The model as training sees it. The same code path serves policy and reference."""

    def __init__(self, model: Any):
        super().__init__()
        install_logprob_head(model)
        self.model = model

    def forward(
        self,
        input_ids_T: torch.Tensor,
        position_ids_XT: torch.Tensor,
        predictor_rows_N: torch.Tensor,
        target_N: torch.Tensor,
        image_inputs: dict[str, torch.Tensor],
        terms: PreferenceTerms | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """fp32 log-probs [N] of `target_N`, or with `terms` losses and rewards [P] and the log-probs.

        Call it, and its backward, inside `packed_layout`.
        """
        channels = position_ids_XT.shape[0]
        hidden_TD = self.model.model(
            input_ids=input_ids_T[None],
            position_ids=position_ids_XT if channels == 1 else position_ids_XT[:, None],
            use_cache=False,
            **image_inputs,
        ).last_hidden_state[0]
        # Only rows that predict a response token reach the LM head; prompt and image rows never do.
        return self.model.lm_head(hidden_TD[predictor_rows_N], target_N, terms)


def model_inputs(batch: GroupBatch, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The keyword arguments of `PolicyModel.forward`, on the device; pixels in the model's dtype."""
    there = batch.to(device, dtype)
    names = ("input_ids_T", "position_ids_XT", "predictor_rows_N", "target_N", "image_inputs")
    return {name: getattr(there, name) for name in names}
