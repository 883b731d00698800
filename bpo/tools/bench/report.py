"""Report of `bpo bench step`: agreement of the providers, comparison of their figures, verdicts on the targets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

# Tolerances between two providers by dtype: summed log-probs of an answer in nats per token, mean loss in nats, and
# relative gradient norm. In bf16, every activation has 8 bits on both sides; TRL keeps its adapter in fp32 (autocast).
# On an H100, LLaVA-1.5-7B with random weights (log-probs of -11.6 per token) was up to 0.023 and 0.056 from TRL, and
# TRL with Liger's layers 0.021 from TRL itself; in fp32 the step must agree to the first row.
TOLERANCES = {"float32": (1e-4, 1e-4, 1e-3), "bfloat16": (4e-2, 8e-2, 1e-1)}
OURS, THEIRS = "bpo", "trl"
# TRL's variants in order of preference for the comparison: on GPU, its users enable Liger's layer kernels.
ANCHORS = ("trl-liger", THEIRS)


@dataclass(frozen=True)
class Figures:
    """Costs of one provider per pair.

    Attributes:
        flops: Of forward, backward and the reference if the step computes it; None if the counter missed an operator.
        tokens: Positions through the language model, including padding.
        images: Images through the vision tower.
        peak_bytes: Of the whole step, not per pair.
        seconds: One entry per repetition.
    """

    flops: float | None
    tokens: float
    images: float
    peak_bytes: int
    seconds: tuple[float, ...]

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Verdict:
    """A target and its measurement; `met` is None if not measured, `predicted` is an arithmetic estimate."""

    target: str
    measured: str
    met: bool | None
    predicted: str = ""


def figures(measured: dict[str, Any], num_pairs: int) -> Figures:
    """Figures per pair from `measure_provider`, for steps (or reference passes) over `num_pairs` pairs."""
    flops = measured["flops"]["flops"]
    return Figures(
        flops=None if flops is None else flops / num_pairs,
        tokens=measured["flops"]["tokens"] / num_pairs,
        images=measured["flops"]["images"] / num_pairs,
        peak_bytes=measured["memory"]["peak_bytes"],
        seconds=tuple(timed["seconds"] / num_pairs for timed in measured["time"]),
    )


def preference_loss(pair: dict[str, float], beta: float) -> float:
    """-log sigma(Delta) of summed log-probs (arXiv 2305.18290 eq. 7), in fp64."""
    chosen = pair["chosen"] - pair["reference_chosen"]
    rejected = pair["rejected"] - pair["reference_rejected"]
    delta = beta * (chosen - rejected)
    return math.log1p(math.exp(-abs(delta))) + max(-delta, 0.0)


def disagreements(
    ours: dict[str, Any], theirs: dict[str, Any], dtype: str, beta: float, answer_tokens: dict[str, tuple[int, int]]
) -> list[str]:
    """Differences between two providers' first steps beyond rounding; empty if they agree.

    Args:
        ours, theirs: `pairs` (summed log-probs by label), `loss` and `grad_norm` of a step.
        answer_tokens: Tokens of the (chosen, rejected) answer by label; the log-prob tolerance is per token.
    """
    logp_tolerance, loss_tolerance, norm_tolerance = TOLERANCES[dtype]
    if ours["pairs"].keys() != theirs["pairs"].keys():
        return [f"the pairs differ: {sorted(ours['pairs'])} and {sorted(theirs['pairs'])}"]
    found = []
    for label, our_pair in ours["pairs"].items():
        their_pair = theirs["pairs"][label]
        for side, tokens in zip(("chosen", "rejected"), answer_tokens[label], strict=True):
            for name in (side, f"reference_{side}"):
                gap = abs(our_pair[name] - their_pair[name]) / tokens
                if not gap <= logp_tolerance:
                    found.append(
                        f"pair {label}: {name.replace('_', ' ')} log-probs are {our_pair[name]:.4f} and "
                        f"{their_pair[name]:.4f}: {gap:.2g} nats per token apart (tolerance {logp_tolerance:g})"
                    )
    for who, step in ((OURS, ours), (THEIRS, theirs)):
        expected = statistics.fmean(preference_loss(pair, beta) for pair in step["pairs"].values())
        if not abs(step["loss"] - expected) <= loss_tolerance:
            found.append(f"{who}: the loss is {step['loss']:.6f}, but {expected:.6f} from its log-probs")
    if not abs(ours["loss"] - theirs["loss"]) <= loss_tolerance:
        found.append(f"the losses are {ours['loss']:.6f} and {theirs['loss']:.6f} (tolerance {loss_tolerance:g})")
    if not abs(ours["grad_norm"] - theirs["grad_norm"]) <= norm_tolerance * theirs["grad_norm"]:
        found.append(f"the gradient norms are {ours['grad_norm']:.6g} and {theirs['grad_norm']:.6g}")
    return found


def anchor_of(providers: Collection[str]) -> str | None:
    """The TRL variant among `providers` that bpo is compared with."""
    return next((name for name in ANCHORS if name in providers), None)


def ratios(step: Figures, reference: Figures, theirs: Figures, epochs: int) -> dict[str, Any]:
    """Costs of bpo relative to TRL; `amortised` adds the reference pass divided by the number of epochs.

    Time ratios are per repetition, as the providers take turns: median, least and largest. Uncounted FLOPs give None.
    """

    def flops_ratio(share: float) -> float | None:
        if step.flops is None or reference.flops is None or theirs.flops is None:
            return None
        return (step.flops + share * reference.flops) / theirs.flops

    def time_ratio(share: float) -> dict[str, float]:
        ours = [a + share * b for a, b in zip(step.seconds, reference.seconds, strict=True)]
        values = [a / b for a, b in zip(ours, theirs.seconds, strict=True)]
        return {"median": statistics.median(values), "least": min(values), "largest": max(values)}

    return {
        "flops": flops_ratio(0.0),
        "flops_amortised": flops_ratio(1 / epochs),
        "tokens": step.tokens / theirs.tokens,
        "tokens_amortised": (step.tokens + reference.tokens / epochs) / theirs.tokens,
        "images": step.images / theirs.images,
        "images_amortised": (step.images + reference.images / epochs) / theirs.images,
        "peak_bytes": step.peak_bytes / theirs.peak_bytes,
        "seconds": time_ratio(0.0),
        "seconds_amortised": time_ratio(1 / epochs),
    }


def judge(case: dict[str, Any], ratio: dict[str, Any] | None) -> list[Verdict]:
    """Verdicts on the targets, which apply only to lengths of 576 + 44 + 100 tokens; empty for other lengths.

    Args:
        case: `image_tokens`, `prompt_tokens`, `answer_tokens`, `completions`, `epochs`, `device` and `model`.
        ratio: From `ratios`; None if TRL was not measured.
    """
    lengths = tuple(case.get(key) for key in ("image_tokens", "prompt_tokens", "answer_tokens"))
    if lengths != (576, 44, 100) or case["completions"] not in (2, 3):
        return []
    where = f"{case['completions']} completions"
    least, amortised = {2: (0.40, 0.52), 3: (0.27, 0.30)}[case["completions"]]
    wanted = [(f"{where}: FLOPs per pair, stored reference: <= {least:g}x TRL's", "flops", least)]
    if case["epochs"] == 2:
        wanted.append(
            (f"{where}: with the reference pass over 2 epochs: <= {amortised:g}x", "flops_amortised", amortised)
        )
    if case["device"] == "cpu":
        wanted.append((f"{where}: time per pair on CPU: <= 0.5x TRL's", "seconds", 0.5))
    verdicts = []
    for target, name, limit in wanted:
        value = None if ratio is None else ratio[name]["median"] if name == "seconds" else ratio[name]
        if value is None:
            verdicts.append(Verdict(target, "not measured", None))
        else:
            verdicts.append(Verdict(target, f"{value:.3f}", value <= limit))
    return verdicts + gpu_verdicts(case, ratio)


# Estimates by number of completions. Time: TFLOP per group of LLaVA-1.5-7B with gradient checkpointing, 38.6 against
# 86.6 for two completions and 44.8 against 129.9 for three. Memory: 18 and 22 GB in total, including 14.1 of weights.
PREDICTIONS = {2: ("2.2x (FLOPs)", "0.5 (4 of 8 GB)"), 3: ("2.9x (FLOPs)", "")}


def gpu_verdicts(case: dict[str, Any], ratio: dict[str, Any] | None) -> list[Verdict]:
    """Verdicts on the targets for the full LLaVA-1.5-7B shape on one GPU; not measured in other cases.

    Args:
        case: `completions`, `device` and `model`.
        ratio: From `ratios`; None if TRL was not measured.
    """
    completions = case["completions"]
    speed = f"step, {completions} completions, LLaVA-1.5-7B on a GPU: pairs/s >= 2x TRL's"
    memory = f"step, {completions} completions, LLaVA-1.5-7B on a GPU: peak above the weights <= 0.5x TRL's"
    speed_predicted, memory_predicted = PREDICTIONS.get(completions, ("", ""))
    if ratio is None or case["device"] != "cuda" or case["model"] != "llava-1.5-7b":
        return [
            Verdict(speed, "not measured", None, speed_predicted),
            Verdict(memory, "not measured", None, memory_predicted),
        ]
    speed_up = 1 / ratio["seconds"]["median"]
    return [
        Verdict(speed, f"{speed_up:.2f}x", speed_up >= 2, speed_predicted),
        Verdict(memory, f"{ratio['peak_bytes']:.3f}x", ratio["peak_bytes"] <= 0.5, memory_predicted),
    ]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(who: str, costs: Figures) -> list[str]:
    spread = f"{min(costs.seconds):.3f}-{max(costs.seconds):.3f}"
    return [
        who,
        "not counted" if costs.flops is None else f"{costs.flops / 1e9:,.2f}",
        f"{costs.tokens:,.0f}",
        f"{costs.images:g}",
        f"{costs.peak_bytes / 2**20:,.1f}",
        f"{costs.median_seconds:.3f} ({spread})",
    ]


def table(result: dict[str, Any]) -> str:
    """The figures of one case as Markdown."""
    peak = "peak MiB above the weights" if result["case"].get("device") == "cuda" else "peak MiB / step"
    head = ["", "GFLOP / pair", "LM tokens / pair", "images / pair", peak, "s / pair (range)"]
    lines = [_row(head), _row(["---"] * len(head))]
    found = {name: Figures(**one) for name, one in result["figures"].items()}
    names = {"bpo": "bpo, one step", "bpo-reference": "bpo, reference pass", "trl": "TRL", "trl-liger": "TRL, Liger"}
    lines += [_row(_cells(names[name], found[name])) for name in names if name in found]
    lines += [_row([names[name], f"refused: {why}", "", "", "", ""]) for name, why in result["refused"].items()]
    if result["ratios"]:
        anchor = names[result["ratios"].get("anchor", THEIRS)]
        for suffix, title in (
            ("", f"bpo / {anchor}"),
            ("_amortised", f"with the reference pass over {result['case']['epochs']} epochs"),
        ):
            lines.append(_row(_ratio_cells(title, suffix, result["ratios"])))
    return "\n".join(lines)


def _ratio_cells(title: str, suffix: str, ratio: dict[str, Any]) -> list[str]:
    seconds = ratio[f"seconds{suffix}"]
    return [
        f"**{title}**",
        *(
            "" if ratio[name + suffix] is None else f"**{ratio[name + suffix]:.3f}**"
            for name in ("flops", "tokens", "images")
        ),
        f"**{ratio['peak_bytes']:.3f}**" if not suffix else "",
        f"**{seconds['median']:.3f}** ({seconds['least']:.3f}-{seconds['largest']:.3f})",
    ]


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    words = {True: "yes", False: "**no**", None: "not measured"}
    lines = [_row(["target", "predicted (est.)", "measured", "met"]), _row(["---"] * 4)]
    return "\n".join([*lines, *(_row([v.target, v.predicted, v.measured, words[v.met]]) for v in verdicts)])
