"""What TRL 1.16 makes of crafted log-probs: its own loss lines run, without a model, a tokenizer or a dataset.

`DPOTrainer.compute_loss` computes log-probs by calling a model; here the model is an object that returns the given
ones. CPO and ORPO have functions of their own.

Shape letters: B = 2 P rows, first the chosen answers, then the rejected; S tokens of the longest answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Answers = Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class TrlLoss:
    """TRL's loss of a batch and its gradient by each answer's token log-probs."""

    loss: float
    chosen_gradients: list[Tensor]
    rejected_gradients: list[Tensor]


class _Model(torch.nn.Module):
    """Returns the same outputs at every call, with TRL's names for what its fused LM head computes."""

    is_gradient_checkpointing = False

    def __init__(self, logp_BS: Tensor, log_sum_sq_BS: Tensor) -> None:
        super().__init__()
        zeros_BS = torch.zeros_like(log_sum_sq_BS)
        self.outputs = SimpleNamespace(
            log_probs=logp_BS,
            log_sum_sq_probs=log_sum_sq_BS,
            entropy=zeros_BS,
            mean_logits=zeros_BS,
            is_top1=zeros_BS.bool(),
        )

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return self.outputs


def trl_dpo(
    chosen: Answers,
    rejected: Answers,
    chosen_reference: Answers,
    rejected_reference: Answers,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ld_alpha: float | None = None,
    chosen_log_sum_sq: Answers | None = None,
    rejected_log_sum_sq: Answers | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
) -> TrlLoss:
    """`DPOTrainer.compute_loss` on the token log-probs of P pairs, a batch of one process.

    Args:
        chosen, rejected: P vectors each of log pi(y_t), as many as the answer has tokens.
        chosen_reference, rejected_reference: the reference's.
        loss_type, beta, label_smoothing, f_divergence_type, f_alpha_divergence_coef, discopop_tau: as in `DPOConfig`.
        ld_alpha: weight of the tokens beyond the shorter answer's length (LD-DPO); None leaves them alone.
        chosen_log_sum_sq, rejected_log_sum_sq: log sum_v pi(v)^2 at each token, P vectors each. If given, pairs are
            weighted (WPO, `use_weighting`).

    Returns:
        The mean over the pairs, and the gradients of that mean.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    answers = [*chosen, *rejected]
    leaves = [answer.detach().clone().requires_grad_() for answer in answers]
    policy_BS = pad_sequence(leaves, batch_first=True)
    reference_BS = pad_sequence([*chosen_reference, *rejected_reference], batch_first=True)
    weighted = chosen_log_sum_sq is not None and rejected_log_sum_sq is not None
    log_sum_sq = [*chosen_log_sum_sq, *rejected_log_sum_sq] if weighted else [torch.zeros_like(a) for a in answers]

    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer.accelerator = _accelerator()
    trainer.model = _Model(policy_BS, pad_sequence(log_sum_sq, batch_first=True))
    trainer.ref_model = _Model(reference_BS, torch.zeros_like(reference_BS))
    trainer.args = SimpleNamespace(discopop_tau=discopop_tau, gradient_checkpointing_kwargs=None, max_length=None)
    trainer.aux_loss_enabled, trainer.precompute_ref_logps, trainer.use_weighting = False, False, weighted
    trainer.loss_types, trainer.loss_weights = [loss_type], [1.0]
    trainer.beta, trainer.label_smoothing, trainer.ld_alpha = beta, label_smoothing, ld_alpha
    trainer.f_divergence_type, trainer.f_alpha_divergence_coef = f_divergence_type, f_alpha_divergence_coef
    trainer._metrics = {"train": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1

    ones_BS = pad_sequence([torch.ones(len(answer), dtype=torch.long) for answer in answers], batch_first=True)
    # TRL shifts by one: before the answer there is a prompt of one token.
    mask_BS1 = torch.cat([torch.zeros(len(answers), 1, dtype=torch.long), ones_BS], dim=1)
    inputs = {"input_ids": torch.zeros_like(mask_BS1), "attention_mask": mask_BS1, "completion_mask": mask_BS1}
    loss = trainer.compute_loss(trainer.model, inputs)
    gradients = [
        torch.zeros_like(answer) if gradient is None else gradient
        for gradient, answer in zip(torch.autograd.grad(loss, leaves, allow_unused=True), answers, strict=True)
    ]
    return TrlLoss(loss.item(), gradients[: len(chosen)], gradients[len(chosen) :])


def trl_cpo(
    chosen_P: Tensor, rejected_P: Tensor, *, loss_type: str, beta: float, label_smoothing: float, simpo_gamma: float
) -> Tensor:
    """Losses [P] of `CPOTrainer.cpo_loss`, with gradient, from log-probs of answers (SimPO: their means)."""
    from trl.experimental.cpo import CPOTrainer

    trainer = CPOTrainer.__new__(CPOTrainer)
    trainer.accelerator, trainer.alpha, trainer.loss_type = _accelerator(), 0.0, loss_type
    trainer.beta, trainer.label_smoothing, trainer.simpo_gamma = beta, label_smoothing, simpo_gamma
    return trainer.cpo_loss(chosen_P, rejected_P)[0]


def trl_orpo(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """Losses [P] of `ORPOTrainer.odds_ratio_loss` with lambda 1, with gradient, in fp32, from mean log-probs.

    TRL's function returns lambda log sigmoid, which its caller subtracts.
    """
    from trl.experimental.orpo import ORPOTrainer

    trainer = ORPOTrainer.__new__(ORPOTrainer)
    trainer.accelerator, trainer.beta = _accelerator(), 1.0
    return -trainer.odds_ratio_loss(chosen_P, rejected_P)[0]


def _accelerator() -> SimpleNamespace:
    """The part of accelerate's that losses use, for one process."""
    return SimpleNamespace(
        device=torch.device("cpu"), gather=lambda tensor: tensor, gather_for_metrics=lambda tensor: tensor
    )
