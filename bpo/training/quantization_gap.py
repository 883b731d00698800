"""How far a quantised policy is from the unquantised model before the first step.

Shape letters: N response tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import logging
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bpo.config.training import Config
from bpo.data.transfer import on_device
from bpo.engine import TrainingEngine
from bpo.job.durable import write_durably
from bpo.model.levers.quantized_layers import drop_originals, layers_of, original_weights
from bpo.training.batches import micro_batches
from bpo.training.measure import TrainingData
from bpo.training.plan import RunGroups

logger = logging.getLogger(__name__)

FILE = "quantization.json"
_MAX_GROUPS = 8
_ROWS = 128  # positions whose logits are in memory at once


def report_quantization_gap(config: Config, engine: TrainingEngine, groups: RunGroups) -> None:
    """Logs the distance of a new run's quantised policy to the unquantised model, and writes it to quantization.json.

    Rank 0 measures on a micro-batch of up to 8 groups with two forward passes: with the quantised weights, and with
    those that `load_base(keep_original=True)` left in host memory, which every rank then frees. Without such weights
    (a resumed run, or no quantisation) it does nothing.
    """
    model = engine.policy.model
    if not any(layer.original_OI is not None for layer in layers_of(model)):
        return
    if engine.ranks.is_main and not groups.measured.usable:
        logger.warning("quantisation was not compared with unquantised weights: no groups before the first step")
    elif engine.ranks.is_main:
        gap = {"quantization": config.model.quantization, **_measure(config, engine, groups.measured)}
        logger.info(
            "%s against unquantised weights: log-probs of %d tokens differ by %.2e on average and by up to %.2e; "
            "KL divergence %.2e nats per token",
            *(gap[name] for name in ("quantization", "tokens", "mean_abs", "max_abs", "kl")),
        )
        text = json.dumps(gap, indent=1) + "\n"
        write_durably(Path(config.train.output_dir) / FILE, text, sync=False)
    drop_originals(model)


def _measure(config: Config, engine: TrainingEngine, data: TrainingData) -> dict[str, Any]:
    sizes_tokens = enumerate(accumulate(data.num_tokens[:_MAX_GROUPS]))
    chosen = [group for group, total in sizes_tokens if total <= config.train.max_micro_batch_tokens]
    batches = micro_batches(config.data, data, [(chosen or [0], False)], engine, for_reference=True)
    batch = next(iter(on_device(batches, engine.device, engine.dtype)))
    with torch.compiler.set_stance("force_eager"):  # two passes are not worth compiling layers for their row
        quantized_ND = engine.hidden_states(batch)
        with original_weights(engine.policy.model):
            original_ND = engine.hidden_states(batch)
    return distance(engine.policy.model.lm_head, quantized_ND, original_ND, batch.target_N)


@torch.no_grad()
def distance(
    head: torch.nn.Linear, quantized_ND: torch.Tensor, original_ND: torch.Tensor, target_N: torch.Tensor
) -> dict[str, Any]:
    """Differences of token log-probs, in nats, and the mean KL(original || quantised) over the vocabulary."""
    delta, kl = [], []
    for rows in torch.arange(len(target_N), device=target_N.device).split(_ROWS):
        quantized_NV, original_NV = (
            torch.log_softmax(F.linear(hidden_ND[rows], head.weight, head.bias).float(), -1)
            for hidden_ND in (quantized_ND, original_ND)
        )
        delta.append((quantized_NV - original_NV).gather(1, target_N[rows, None])[:, 0])
        kl.append((original_NV.exp() * (original_NV - quantized_NV)).sum(1))
    delta_N, kl_N = torch.cat(delta).abs(), torch.cat(kl)
    means = {"mean_abs": float(delta_N.mean()), "max_abs": float(delta_N.max()), "kl": float(kl_N.mean())}
    return {"tokens": len(target_N), **means}
