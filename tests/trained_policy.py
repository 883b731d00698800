"""One forward and backward pass of a tiny policy, and the comparison of its gradients with another's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bpo.config.training import Config
from bpo.data.families import Family
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.load import load_model
from bpo.model.policy import PolicyModel, model_inputs
from bpo.model.trainable import prepare_trainable
from bpo.records import GroupBatch


class Trained(NamedTuple):
    """Log-probs of the response tokens, and gradients of their weighted sum by the parameter's name."""

    logp_N: torch.Tensor
    gradients: dict[str, torch.Tensor]


def policy_of(
    config: Config,
    family: Family,
    install: Callable[[Any], Any] = lambda model: None,
    device: torch.device | None = None,
) -> PolicyModel:
    """A policy as training makes it; `install` changes the model, as levers do. An adapter's B is not zero."""
    model = load_model(config.model, for_training=True)
    prepare_trainable(model, family, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # otherwise the adapter is 0 and its dropout has no effect
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    install(model)
    return PolicyModel(model.to(device or torch.device("cpu"))).train()


def trained(policy: PolicyModel, batch: GroupBatch) -> Trained:
    weight = next(policy.parameters())
    torch.manual_seed(3)
    with packed_layout(batch.layout):
        logp_N = policy(**model_inputs(batch.to(weight.device, weight.dtype)))
        (logp_N * torch.arange(1, len(logp_N) + 1, device=logp_N.device)).sum().backward()
    return Trained(logp_N.detach(), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None})


def assert_equal_to_rounding(actual: Trained, expected: Trained, tolerance: float = 1e-5) -> None:
    """Relative to each tensor's largest element: single elements are differences of larger numbers.

    Gradients that are 0 but for rounding, as those of the keys' bias, have a bound relative to all gradients.
    """
    assert actual.gradients.keys() == expected.gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    for name, one, other in [
        ("log-probs", actual.logp_N, expected.logp_N),
        *((name, actual.gradients[name], expected.gradients[name]) for name in expected.gradients),
    ]:
        bound = tolerance * (float(other.abs().max()) + (0.0 if name == "log-probs" else 0.01 * largest))
        error = float((one - other).abs().max())
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"
