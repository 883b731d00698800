"""The LM head that returns log-probs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bpo.config.training import ModelConfig
from bpo.model.head import LogProbHead, install_logprob_head
from bpo.model.load import load_model
from tests.tiny import tiny_llava


class Headed(torch.nn.Module):
    def __init__(self, head: torch.nn.Module):
        super().__init__()
        self.lm_head = head


def test_log_probs_and_gradients_equal_log_softmax() -> None:
    torch.manual_seed(0)
    model = Headed(torch.nn.Linear(16, 50, bias=True))
    hidden_NH, target_N = torch.randn(7, 16), torch.randint(0, 50, (7,))
    plain = model.lm_head(hidden_NH).log_softmax(-1).gather(1, target_N[:, None])[:, 0]
    plain.square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.lm_head.parameters()]
    model.zero_grad()
    install_logprob_head(model)
    logp_N = model.lm_head(hidden_NH, target_N)
    logp_N.square().sum().backward()
    torch.testing.assert_close(logp_N, plain, atol=1e-5, rtol=0)
    for parameter, gradient in zip(model.lm_head.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=0)


def test_half_precision_gives_fp32_log_probs() -> None:
    model = Headed(torch.nn.Linear(16, 50, bias=False).bfloat16())
    install_logprob_head(model)
    assert model.lm_head(torch.randn(3, 16).bfloat16(), torch.tensor([1, 2, 3])).dtype == torch.float32


def test_frozen_head_gets_no_gradient_and_hands_one_down() -> None:
    model = Headed(torch.nn.Linear(16, 50, bias=False).requires_grad_(False))
    install_logprob_head(model)
    hidden_NH = torch.randn(3, 16, requires_grad=True)
    model.lm_head(hidden_NH, torch.tensor([1, 2, 3])).sum().backward()
    assert model.lm_head.weight.grad is None
    assert float(hidden_NH.grad.abs().sum()) > 0


@pytest.mark.parametrize("tied", [False, True])
def test_state_dict_keeps_its_names_and_tied_weights_stay_one_parameter(tmp_path: Path, tied: bool) -> None:
    directory = tiny_llava(tmp_path / "model", tie_word_embeddings=tied)
    model = load_model(ModelConfig(path=str(directory), dtype="float32"), for_training=True)
    names, parameters = list(model.state_dict()), {id(p) for p in model.parameters()}
    install_logprob_head(model)
    install_logprob_head(model)  # again: no effect
    assert type(model.lm_head) is LogProbHead
    assert list(model.state_dict()) == names and "lm_head.weight" in names
    assert {id(p) for p in model.parameters()} == parameters
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_without_targets_it_is_the_linear_layer() -> None:
    head = torch.nn.Linear(16, 50)
    hidden = torch.randn(2, 3, 16)
    expected = head(hidden)
    model = Headed(head)
    install_logprob_head(model)
    assert torch.equal(model.lm_head(hidden), expected)


def test_a_head_that_is_no_plain_linear_is_refused() -> None:
    class Adapted(torch.nn.Linear):
        pass

    with pytest.raises(ValueError, match="the LM head is a Adapted, not torch.nn.Linear"):
        install_logprob_head(Headed(Adapted(4, 4)))
