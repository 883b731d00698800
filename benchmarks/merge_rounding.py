"""What survives of a small LoRA when it is merged into bfloat16 weights, for each rounding of `bpo export`.

Also for first-order error feedback, which `bpo export` does not have because of these figures.

    python benchmarks/merge_rounding.py --json benchmarks/results/merge-cpu.json

`layers`: one matrix W ~ N(0, 0.02) with a random LoRA of a given rms(dW), and inputs whose channels have means and very
different scales, as hidden states do. `trained`: adapters of a small language model, trained with DPO on random answers
at several learning rates; the figures are of log-probs of all answer tokens, in fp32 arithmetic.

survived: projection of what was written on the training's change, of weights (`weights`), of outputs of the matrix
(`outputs`) or of log-probs (`log_probs`); 1 is all. error: norm of the difference relative to that of the change. For
log-probs, `gap` is the mean |merged - trained| / mean |trained - base|, `margin` the fraction of the mean change of
(chosen - rejected).

Shape letters: O outputs, I inputs, R rank, S samples, B sequences, T tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from synthetic import VOCABULARY, machine_of_run, small_llava

from bpo.checkpoint import merge
from bpo.config.training import Config, LoraConfig, ModelConfig, TrainableConfig
from bpo.data.families import family_of
from bpo.model.load import load_model
from bpo.model.trainable import prepare_trainable

CHANGES = (1e-5, 3e-5, 1e-4, 3e-4)
LEARNING_RATES = (1e-7, 4e-7, 1.5e-6, 5e-6)
RANK, ALPHA, STEPS = 8, 64.0, 100
SHAPE, NUM_INPUTS = (1024, 1024), 512
PAIRS, PROMPT_TOKENS, ANSWER_TOKENS = 16, 16, 24


def round_error_feedback(weight_OI: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """First-order error feedback along the input dimension: each weight takes the error of the one before.

        y_j = round(w_j + e_{j-1}),  e_j = w_j + e_{j-1} - y_j

    Partial sums of a row of y differ from those of w by at most half a spacing, so that changes which are each too
    small to be written add up until one is. Weights near zero have a fine spacing and absorb the error.
    """
    columns_IO = weight_OI.double().T.contiguous()
    written_IO = torch.empty(columns_IO.shape, dtype=dtype)
    error_O = torch.zeros(columns_IO.shape[1], dtype=torch.float64)
    for number, column_O in enumerate(columns_IO):
        wanted_O = column_O + error_O
        written_IO[number] = wanted_O.to(dtype)
        error_O = wanted_O - written_IO[number].double()
    return written_IO.T.contiguous()


merge.ROUNDINGS["error_feedback"] = round_error_feedback


def hidden_states(generator: torch.Generator) -> torch.Tensor:
    """[S, I]: log-normal scales of the channels, a mean of a third of the scale, unit rms per sample."""
    scale_I = torch.randn(SHAPE[1], generator=generator).exp()
    mean_I = torch.randn(SHAPE[1], generator=generator) / 3
    x_SI = scale_I * (mean_I + torch.randn(NUM_INPUTS, SHAPE[1], generator=generator))
    return x_SI / x_SI.square().mean(1, keepdim=True).sqrt()


def projection(found: torch.Tensor, change: torch.Tensor) -> float:
    return float((found * change).sum() / (change * change).sum())


def measure_layer(rms: float, rounding: str) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    base_OI = (0.02 * torch.randn(SHAPE, generator=generator)).bfloat16().float()
    a_RI = torch.randn(RANK, SHAPE[1], generator=generator)
    delta_OI = torch.randn(SHAPE[0], RANK, generator=generator) @ a_RI
    delta_OI *= rms / delta_OI.square().mean().sqrt()
    x_SI = hidden_states(generator)
    written_OI = merge.ROUNDINGS[rounding](base_OI + delta_OI, torch.bfloat16, "layer").float()
    moved_SO, change_SO = x_SI @ (written_OI - base_OI).T, x_SI @ delta_OI.T
    return {
        "weights": projection(written_OI - base_OI, delta_OI),
        "outputs": projection(moved_SO, change_SO),
        "output_error": float((moved_SO - change_SO).norm() / change_SO.norm()),
    }


def answers(generator: torch.Generator) -> torch.Tensor:
    """[2 pairs, T] token ids: chosen answers, then rejected ones, to the same prompts."""
    prompts = torch.randint(4, VOCABULARY, (PAIRS, PROMPT_TOKENS), generator=generator)
    replies = torch.randint(4, VOCABULARY, (2 * PAIRS, ANSWER_TOKENS), generator=generator)
    return torch.cat([torch.cat([prompts, prompts]), replies], dim=1)


def answer_logp(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """Log-probs of the answer tokens, [B, answer tokens]."""
    logits = model(input_ids=ids_BT, use_cache=False).logits[:, PROMPT_TOKENS - 1 : -1].float()
    return F.log_softmax(logits, -1).gather(2, ids_BT[:, PROMPT_TOKENS:, None])[..., 0]


def trained_adapter(path: Path, lr: float, ids_BT: torch.Tensor) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    """The base in bfloat16, the adapted model in fp32 on the same weights, and the log-probs of both."""
    lora = LoraConfig(r=RANK, alpha=ALPHA, dropout=0.0)
    config = Config(
        model=ModelConfig(path=str(path), dtype="bfloat16"), lora=lora, trainable=TrainableConfig(projector="frozen")
    )
    base = load_model(config.model)
    model = copy.deepcopy(base)
    prepare_trainable(model, family_of(model.config), config)
    model.float()
    with torch.no_grad():
        before = answer_logp(model, ids_BT)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(STEPS):
        chosen, rejected = (answer_logp(model, ids_BT) - before).sum(1).chunk(2)
        loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return base, model, before, answer_logp(model, ids_BT)


def measure_trained(path: Path, lr: float) -> list[dict[str, Any]]:
    ids_BT = answers(torch.Generator().manual_seed(1))
    base, model, before, after = trained_adapter(path, lr, ids_BT)
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    change, rows = after - before, []
    for rounding in merge.ROUNDINGS:
        merged = copy.deepcopy(base)
        fate = merge.merge_into(merged, state, scale=ALPHA / RANK, dtype=torch.bfloat16, rounding=rounding).to_json()
        with torch.no_grad():
            moved = answer_logp(merged.float(), ids_BT) - before
        margins = [float((chosen - rejected).mean()) for chosen, rejected in (moved.chunk(2), change.chunk(2))]
        rows.append(
            {
                "rms_change": fate["rms_change"],
                "rounding": rounding,
                "weights": fate["survived"],
                "unchanged": fate["unchanged_share"],
                "log_probs": projection(moved, change),
                "gap": float((moved - change).abs().mean() / change.abs().mean()),
                "margin": margins[0] / margins[1],
                "change_nats": float(change.abs().mean()),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    layers = [
        {"rms_change": rms, "rounding": rounding, **measure_layer(rms, rounding)}
        for rms in CHANGES
        for rounding in merge.ROUNDINGS
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = small_llava(Path(folder), hidden=256, layers=4)
        trained = [{"lr": lr, **row} for lr in LEARNING_RATES for row in measure_trained(path, lr)]
    result = {"machine": machine_of_run(), "layers": layers, "trained": trained}
    for row in (*layers, *trained):
        print(json.dumps({name: float(f"{v:.3g}") if isinstance(v, float) else v for name, v in row.items()}))
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
