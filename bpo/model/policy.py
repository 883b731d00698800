"""One forward pass over a packed batch: token ids and images in, log-probs of the response tokens out.

Shape letters: T packed tokens, N response tokens, D hidden size, X position channels (1 or 3), B padded rows,
F images (or tiles) in these rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bpo.data.families import family_of
from bpo.model.head import install_logprob_head
from bpo.model.vision.tower import FrozenTower
from bpo.records import GroupBatch, HeadRequest, LossInputs


class PolicyModel(torch.nn.Module):
    """Wraps the model for training; policy and reference use the same code path."""

    def __init__(self, model: Any):
        super().__init__()
        install_logprob_head(model)
        self.model = model
        self._feature_rows_F: torch.Tensor | None = None
        family = family_of(model.config)
        self.tower = FrozenTower(model, family)
        if family.repeats_features:
            for name in family.projector_modules:
                model.get_submodule(name).register_forward_hook(self._repeat_features)

    def _repeat_features(self, module: torch.nn.Module, inputs: Any, features: torch.Tensor) -> torch.Tensor:
        """Repeats the projector's output for each row that contains the image; tower and projector run once."""
        return features if self._feature_rows_F is None else features[self._feature_rows_F]

    def forget_batch(self) -> None:
        """Before `self.model` runs on anything but a packed batch, such as prompts to answer."""
        self._feature_rows_F = None

    def forward(
        self,
        input_ids_T: torch.Tensor,
        position_ids_XT: torch.Tensor,
        predictor_rows_N: torch.Tensor,
        target_N: torch.Tensor,
        image_inputs: dict[str, torch.Tensor],
        loss_inputs: LossInputs | None = None,
        request: HeadRequest | None = None,
        sequence_inputs: dict[str, torch.Tensor] | None = None,
        feature_rows_F: torch.Tensor | None = None,
        features: Sequence[torch.Tensor] = (),
        reference_ND: torch.Tensor | None = None,
        hidden_only: bool = False,
    ) -> Any:
        """Returns fp32 log-probs [N] of `target_N`, or what `LogProbHead` returns for `loss_inputs` and `request`.

        With `request.extrapolation` = lambda, the log-probs [N] of (1 + lambda) logits - lambda logits of the reference
        follow, without gradient; `reference_ND` are the reference's hidden states, which `hidden_only` returns.

        With `features` of the images (`FrozenTower.encode`), the vision tower does not run.

        Call it, and its backward, inside `packed_layout`. With `sequence_inputs`, T is B concatenated rows of
        [prefix | completion | padding], and the model's own attention is used.
        """
        rows = sequence_inputs["attention_mask"].shape[0] if sequence_inputs else 1
        position_ids_XBT = position_ids_XT.unflatten(1, (rows, -1))
        self._feature_rows_F = feature_rows_F
        with self.tower.given(features):
            hidden_TD = self.model.model(
                input_ids=input_ids_T.unflatten(0, (rows, -1)),
                position_ids=position_ids_XBT[0] if len(position_ids_XBT) == 1 else position_ids_XBT,
                use_cache=False,
                **(sequence_inputs or {}),
                **image_inputs,
            ).last_hidden_state.flatten(0, 1)
        # Only rows that predict a response token reach the LM head; prompt and image rows never do.
        hidden_ND = hidden_TD[predictor_rows_N]
        if hidden_only:
            return hidden_ND
        if request is None or not request.extrapolation:
            return self.model.lm_head(hidden_ND, target_N, loss_inputs, request)
        assert reference_ND is not None
        # Before the pass with gradient: ZeRO-3 counts the backward passes of a module again at each call.
        with torch.no_grad():
            beyond_ND = torch.lerp(reference_ND.float(), hidden_ND.float(), 1 + request.extrapolation)
            extrapolated_N = self.model.lm_head(beyond_ND.to(hidden_ND.dtype), target_N)
        return *self.model.lm_head(hidden_ND, target_N, loss_inputs, request), extrapolated_N


def model_inputs(batch: GroupBatch) -> dict[str, Any]:
    """Keyword arguments of `PolicyModel.forward`, for a batch on the model's device (`GroupBatch.to`)."""
    tensors = ("input_ids_T", "position_ids_XT", "predictor_rows_N", "target_N", "feature_rows_F", "features")
    return {name: getattr(batch, name) for name in (*tensors, "image_inputs", "sequence_inputs")}
