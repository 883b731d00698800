"""The demo's vision tower: a tiny CLIP encoder, trained to recognise the objects before the rest of the model.

It stands in for a pretrained CLIP: its training covers all combinations of objects and includes noised images, so that
its features of a noised scene are uncertain instead of wrong. It is frozen afterwards. The projector is trained with it
and stays trainable.

Shapes: B scenes, C colour channels, H and W pixels, P patches, D tower width, T text width, K objects.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange
from transformers import CLIPVisionModel

from bpo.data.noise import NUM_STEPS, alpha_bar_S

from .sprites import NUM_OBJECTS
from .vocabulary import PIXEL_MEAN, PIXEL_STD
from .world import Scene, WorldConfig, draw_scene, sample_scene

NAME_SCALE, NAME_BIAS = 16.0, -8.0


def pixels_of(world: WorldConfig, scenes: Sequence[Scene]) -> Tensor:
    """pixels_BCHW, identical to the output of the demo's image processor for the saved scenes."""
    image_BHWC = torch.from_numpy(np.stack([np.asarray(draw_scene(world, scene)) for scene in scenes]))
    normalised_BHWC = (image_BHWC.float() / 255.0 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    return normalised_BHWC.permute(0, 3, 1, 2).contiguous()


def objects_of(scenes: Sequence[Scene]) -> Tensor:
    """present_BK: 1 if object k is in scene b."""
    present_BK = torch.zeros(len(scenes), NUM_OBJECTS)
    for row, scene in enumerate(scenes):
        present_BK[row, list(scene.objects)] = 1.0
    return present_BK


def noised(pixels_BCHW: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Replaces a `fraction` of the images with samples of q(x_t | x_0) at uniformly random steps t."""
    batch = len(pixels_BCHW)
    alpha_bar_B111 = alpha_bar_S().float()[torch.randint(NUM_STEPS, (batch,), generator=generator)].view(-1, 1, 1, 1)
    epsilon_BCHW = torch.randn(pixels_BCHW.shape, generator=generator)
    mixed_BCHW = alpha_bar_B111.sqrt() * pixels_BCHW + (1.0 - alpha_bar_B111).sqrt() * epsilon_BCHW
    chosen_B = torch.rand(batch, generator=generator) < fraction
    return torch.where(chosen_B.view(-1, 1, 1, 1), mixed_BCHW, pixels_BCHW)


class Recogniser(nn.Module):
    """A tower, a projector and two classifiers of object presence.

    The first reads each patch of the tower: an object is present if any patch shows it. The second compares the mean of
    the projected patches with the embeddings of the objects' names, as CLIP compares images with words.
    """

    def __init__(self, tower: CLIPVisionModel, projector: nn.Module, names_KT: Tensor) -> None:
        super().__init__()
        self.tower = tower
        self.projector = projector
        self.read = nn.Linear(tower.config.hidden_size, NUM_OBJECTS)
        self.name_bias = nn.Parameter(torch.tensor(NAME_BIAS))
        self.names_KT = F.normalize(names_KT.detach(), dim=-1)
        nn.init.constant_(self.read.bias, -4.0)

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """logits_BK of object presence, of each classifier."""
        hidden_BPD = self.tower(pixels_BCHW).last_hidden_state[:, 1:]
        pooled_BT = F.normalize(self.projector(hidden_BPD).mean(dim=1), dim=-1)
        named_BK = NAME_SCALE * pooled_BT @ self.names_KT.T + self.name_bias
        return torch.logsumexp(self.read(hidden_BPD), dim=1), named_BK


def train_tower(
    tower: CLIPVisionModel,
    projector: nn.Module,
    names_KT: Tensor,
    world: WorldConfig,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    noised_fraction: float,
    progress: bool,
) -> None:
    """Trains a tower and its projector to recognise the objects in biased and unbiased scenes; freezes the tower.

    The scenes come from a separate split, not from the annotations or the evaluation.

    Args:
        names_KT: The language model's input embedding of each object's name; it is not trained.
    """
    generator = torch.Generator().manual_seed(world.seed)
    recogniser = Recogniser(tower, projector, names_KT)
    optimizer = torch.optim.AdamW(recogniser.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, num_steps, pct_start=0.1)
    bar = trange(num_steps, desc="training the vision tower", unit="step", disable=not progress)
    for step in bar:
        first = step * batch_size
        scenes = [sample_scene(world, "tower", first + i, biased_fraction=0.5) for i in range(batch_size)]
        present_BK = objects_of(scenes)
        read_BK, named_BK = recogniser(noised(pixels_of(world, scenes), noised_fraction, generator))
        loss = F.binary_cross_entropy_with_logits(read_BK, present_BK)
        loss = loss + F.binary_cross_entropy_with_logits(named_BK, present_BK)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(recogniser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    tower.requires_grad_(False).eval()
