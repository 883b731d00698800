"""One batch under one view of its images: a forward pass per token, with a KV cache and positions of its own.

Branches that share a cache would not differ after the first token: the second one would read the keys and values of the
first one's image. They cannot share positions either: without its image a prompt is shorter.

Shape letters: B sequences, T tokens, X position channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from bpo.model.decoding.cost import DecodingCost
from bpo.model.generate import left_pad, to_model
from bpo.model.kv_cache import reserved_cache

if TYPE_CHECKING:
    from bpo.data.encode import EncodedPrompt, Encoder


class Branch:
    """Next-token logits of a batch of prompts, left-padded to the longest.

    Args:
        name: View, under which costs are counted.
        model: From `bpo.model.load.load_model`, in eval mode.
        prompts: B prompts under this view.
    """

    def __init__(
        self, name: str, model: Any, encoder: Encoder, prompts: Sequence[EncodedPrompt], cost: DecodingCost
    ) -> None:
        self.name, self._model, self._cost = name, model, cost
        family = encoder.family
        ids_BT, self._mask_BT = left_pad([prompt.prefix_ids for prompt in prompts], encoder.pad_token_id)
        positions = [family.prefix_positions(torch.tensor(p.prefix_ids), p.image_inputs) for p in prompts]
        positions_XBT = torch.zeros(len(positions[0]), *ids_BT.shape, dtype=torch.long)
        for row, of_row_XT in enumerate(positions):
            positions_XBT[:, row, ids_BT.shape[1] - of_row_XT.shape[1] :] = of_row_XT
        self._next_XB1 = torch.stack([of_row_XT.max() + 1 for of_row_XT in positions]).expand(len(positions_XBT), -1)[
            ..., None
        ]
        images = family.batch_image_inputs([prompt.image_inputs for prompt in prompts if prompt.image_inputs])
        self._cache = reserved_cache(model)
        self._prompt = (ids_BT, positions_XBT, family.generation_inputs(ids_BT) | images)

    def prefill(self) -> torch.Tensor:
        """Logits [B, V] of the first token of each answer, fp32."""
        ids_BT, positions_XBT, inputs = self._prompt
        return self._forward(ids_BT, positions_XBT, inputs)

    def step(self, token_B: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] of the token after `token_B`, fp32."""
        self._mask_BT = torch.cat([self._mask_BT, torch.ones_like(self._mask_BT[:, :1])], dim=1)
        logits_BV = self._forward(token_B[:, None], self._next_XB1, {})
        self._next_XB1 = self._next_XB1 + 1
        return logits_BV

    def _forward(
        self, ids_BT: torch.Tensor, positions_XBT: torch.Tensor, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        self._cost.add(self.name, ids_BT)
        # Explicit positions: Qwen-VL's own would continue from the offset of whichever branch ran last.
        position_ids = positions_XBT[0] if len(positions_XBT) == 1 else positions_XBT
        known = {"input_ids": ids_BT, "attention_mask": self._mask_BT, "position_ids": position_ids}
        output = self._model(
            **to_model(known | inputs, self._model), past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        logits_BV: torch.Tensor = output.logits[:, -1].float()
        return logits_BV
