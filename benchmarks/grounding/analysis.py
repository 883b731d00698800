"""Report of the finished runs: figures by arm, paired comparisons with fine-tuning, and what the measures predict.

An effect of one percent is smaller than the noise between seeds and scenes, so arms are compared on the same seeds (the
same records and initial weights) and scenes; intervals are percentiles of a bootstrap over both seeds and scenes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.grounding.arms import ARM_OF, ARMS, FIRST_INJECTION_SEED, tuning_seed_of
from benchmarks.grounding.data import write_json
from bpo.bootstrap.completion_types import COMPLETION_TYPES
from bpo.job.run_record import versions
from bpo_kernels.bench.measure import machine

CONTROL = "sft"
NUM_RESAMPLES = 4000
_COLUMNS = ("wrong", "chair_i", "wrong_colour", "wrong_side", "recall", "yes_no_agrees", "yes_no_contradicts", "words")


def read_scores(root: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Arm -> seed -> the score of its test run; the base model has seed -1."""
    found: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for path in sorted((root / "scores").glob("*-test.json")):
        tree = json.loads(path.read_text(encoding="utf-8"))
        found[tree["arm"]][tree.get("seed", -1)] = tree
    return dict(found)


def wrong_and_asserted(score: dict[str, Any]) -> np.ndarray:
    """[scenes, 2]: wrong facts and asserted facts of each description."""
    return np.array([[sum(d["wrong"].values()), sum(d["asserted"].values())] for d in score["descriptions"]], float)


def compare(arm: dict[int, dict[str, Any]], control: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
    """Ratio of the wrong rates on the common seeds, with a 95 % interval and the two-sided p of no difference."""
    seeds = sorted(set(arm) & set(control) - {-1})
    if not seeds:
        return None
    counts_ASN2 = np.stack([np.stack([wrong_and_asserted(a[seed]) for seed in seeds]) for a in (arm, control)])
    rng = np.random.default_rng(0)
    num_seeds, num_scenes = counts_ASN2.shape[1:3]
    ratios = np.empty(NUM_RESAMPLES)
    for number in range(NUM_RESAMPLES):
        drawn_seeds, drawn_scenes = rng.integers(num_seeds, size=num_seeds), rng.integers(num_scenes, size=num_scenes)
        ratios[number] = _ratio(counts_ASN2[:, drawn_seeds][:, :, drawn_scenes])
    low, high = np.percentile(ratios, [2.5, 97.5])
    recall = [np.mean([d["recall"] for seed in seeds for d in a[seed]["descriptions"]]) for a in (arm, control)]
    return {
        "seeds": seeds,
        "ratio": float(_ratio(counts_ASN2)),
        "interval": [float(low), float(high)],
        "p": float(min(1.0, 2 * min((ratios >= 1).mean(), (ratios <= 1).mean()))),
        "better_seeds": int(sum(_ratio(counts_ASN2[:, [i]]) < 1 for i in range(num_seeds))),
        "recall_difference": float(recall[0] - recall[1]),
    }


def _ratio(counts_AS_N2: np.ndarray) -> float:
    wrong_A2 = counts_AS_N2.sum(axis=(1, 2))
    rate = wrong_A2[:, 0] / np.maximum(wrong_A2[:, 1], 1)
    return float(rate[0] / max(rate[1], 1e-9))


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of the ranks, ties at their mean rank."""
    ranks = [[(np.sum(np.less(v, x)) + np.sum(np.less_equal(v, x)) + 1) / 2 for x in v] for v in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def predictions(root: Path, ratios: dict[str, Any]) -> dict[str, Any]:
    """For each single source: its measures, and its wrong rate over that of fine-tuning on the same records."""
    rows = {}
    for arm in ARMS:
        path = root / f"seed-{tuning_seed_of(arm)}" / "groups.jsonl.measures.json"
        if len(arm.sources) != 1 or not ratios.get(arm.name) or not path.exists():
            continue
        tree = json.loads(path.read_text(encoding="utf-8"))
        kind = COMPLETION_TYPES[arm.sources[0]]
        text, blind = tree["measures"][kind]["text"], tree["model"]["types"][kind]["blind"]
        rows[arm.name] = {
            "text_accuracy": text["accuracy"],
            "blind_median": blind["median"],
            "blind_share": blind["share_above_zero"],
            "blind_histogram": blind["histogram"],
            "seeing_median": tree["model"]["types"][kind]["seeing"]["median"],
            "wrong_over_control": ratios[arm.name]["ratio"],
        }
    if len(rows) < 3:
        return {"sources": rows}
    wrong = [row["wrong_over_control"] for row in rows.values()]
    correlations = {
        "text_accuracy": spearman([row["text_accuracy"] for row in rows.values()], wrong),
        "distance of blind_share from 0.5": spearman([abs(row["blind_share"] - 0.5) for row in rows.values()], wrong),
        "absolute blind_median": spearman([abs(row["blind_median"]) for row in rows.values()], wrong),
    }
    return {"sources": rows, "rank_correlation_with_wrong_over_control": correlations}


def _mean(by_seed: dict[int, dict[str, Any]]) -> dict[str, float]:
    return {key: float(np.mean([score["figures"][key] for score in by_seed.values()])) for key in _COLUMNS}


def results(root: Path) -> dict[str, Any]:
    scores = read_scores(root)
    means = {name: _mean(by_seed) for name, by_seed in scores.items()}
    if on_injection := {seed: s for seed, s in scores.get(CONTROL, {}).items() if seed >= FIRST_INJECTION_SEED}:
        means[CONTROL] = _mean({seed: s for seed, s in scores[CONTROL].items() if seed < FIRST_INJECTION_SEED})
        means[f"{CONTROL} (records of inject)"] = _mean(on_injection)
    ratios = {name: compare(by_seed, scores.get(CONTROL, {})) for name, by_seed in scores.items() if name != CONTROL}
    return {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "means": means,
        "by_seed": {
            name: {str(seed): {"setting": s.get("setting"), **s["figures"]} for seed, s in sorted(by_seed.items())}
            for name, by_seed in scores.items()
        },
        "against_control": ratios,
        "predictions": predictions(root, ratios),
        "tuning": _tuning(root),
    }


def _tuning(root: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for path in sorted((root / "scores").glob("*-validation.json")):
        tree = json.loads(path.read_text(encoding="utf-8"))
        if "setting" in tree:
            found[tree["arm"]][tree["setting"]] = tree["figures"]["wrong"]
    return dict(found)


def table(found: dict[str, Any]) -> str:
    """Figures in percent (words: per description), arms in their order; ratio to the control with its interval."""
    head = ["arm", *_COLUMNS, "wrong / control", "95 %", "p", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in ("base", *ARM_OF, f"{CONTROL} (records of inject)"):
        if name not in found["means"]:
            continue
        mean, versus = found["means"][name], found["against_control"].get(name)
        cells = [f"{mean[key]:.1f}" if key == "words" else f"{100 * mean[key]:.1f}" for key in _COLUMNS]
        tail = ["", "", ""]
        if versus:
            low, high = versus["interval"]
            tail = [f"{versus['ratio']:.2f}", f"{low:.2f}-{high:.2f}", f"{versus['p']:.3f}"]
        lines.append("| " + " | ".join([name, *cells, *tail, str(len(versus["seeds"])) if versus else ""]) + " |")
    return "\n".join(lines)


def write_report(root: Path, json_path: Path | None) -> str:
    """Writes OUTPUT/results.json and report.md; returns the table."""
    found = results(root)
    write_json(root / "results.json", found)
    if json_path:
        write_json(json_path, found)
    text = table(found)
    correlations = found["predictions"].get("rank_correlation_with_wrong_over_control", {})
    lines = [f"- {name}: {value:+.2f}" for name, value in correlations.items()]
    report = "\n".join(
        [text, "", "Rank correlation of a source's measure with the wrong rate it trains to:", *lines, ""]
    )
    (root / "report.md").write_text(report, encoding="utf-8")
    return report
