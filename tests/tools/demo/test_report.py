"""The report as a reader sees it, in a headless browser where there is one."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from bpo.formats.lexicon import build_lexicon
from bpo.tools.charts import thin_out
from bpo.tools.demo.report import (
    CURVES,
    METRICS,
    Curves,
    EvaluationExample,
    Figures,
    MarkedAnswer,
    ReportData,
    TrainingExample,
    Variant,
    mark_answer,
    read_curves,
    write_report,
)
from bpo.tools.measures import Margins, TypeMeasures

LEXICON = build_lexicon([["rock", "stone"], ["leaf"], ["tree"], ["cup", "mug"], ["bed"]])
PRESENT = frozenset({"rock", "leaf"})
MAGENTA = (255, 0, 200)
HOSTILE = '<script>document.title="owned"</script><img src="http://example.invalid/x.png">"\'&'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="needs a browser; chromium, chromium-browser and google-chrome are not on PATH"
)

VARIANTS = {
    "base": ("Base", "before any preference training", 0.25, 0.72),
    "sft": ("Chosen only", "fine-tuning on the chosen side, same steps", 0.24, 0.71),
    "bpo": ("BPO", "weakened images and injected errors", 0.16, 0.72),
    "bpo_weaken_only": ("BPO, weakened only", "negatives from weakened images", 0.21, 0.70),
    "bpo_inject_only": ("BPO, injected only", "negatives from injected errors", 0.18, 0.71),
    "bpo_swap": ("BPO, swap only", "negatives from other images' annotations", 0.15, 0.72),
    "bpo_unweakened": ("BPO, unweakened", "negatives from clean images, a control", 0.22, 0.69),
}


MEASURES = {
    "llm-hal": TypeMeasures(
        0.76, 0.01, None, Margins(-1.7, 0.36, {-4: 8, 1: 3}), Margins(7.4, 0.98, {14: 11}), warnings=("llm-hal: tells",)
    ),
    "swap": TypeMeasures(0.47, 0.02, None, Margins(0.1, 0.52, {-3: 5, 0: 6}), Margins(2.5, 0.9, {5: 11})),
}


def scene(seed: int, noise: float = 0.0) -> Image.Image:
    image = Image.new("RGB", (48, 48), (235, 238, 230))
    draw = ImageDraw.Draw(image)
    draw.rectangle((5, 6, 20, 20), fill=MAGENTA)
    draw.ellipse((26, 24, 43, 41), fill=(40, 90 + 20 * seed % 100, 160))
    pixels = np.asarray(image) + np.random.default_rng(seed).normal(0, 1, (48, 48, 3)) * noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def sample_curves() -> tuple[Curves, ...]:
    rng = np.random.default_rng(0)
    curves = []
    for number, name in enumerate(list(VARIANTS)[1:]):
        rise = [1 - math.exp(-step / (30 + 15 * number)) for step in range(1, 121)]
        shape = {
            "loss": [0.69 - 0.4 * value for value in rise],
            "rewards/margins": [(2 + number) * value for value in rise],
            "rewards/accuracies": [0.5 + 0.45 * value for value in rise],
            "logps/chosen": [-18 - 2 * number * value for value in rise],
            "logps/rejected": [-25 - 30 * value for value in rise],
        }
        points = {
            metric: tuple((float(step), value + rng.normal(0, 0.02) * abs(value)) for step, value in enumerate(line, 1))
            for metric, line in shape.items()
        }
        curves.append(Curves(name, points))
    return tuple(curves)


def sample(seeds: tuple[int, ...] = (0, 1, 2), text: str = "a photo with a rock and a tree.") -> ReportData:
    variants = tuple(
        Variant(
            name,
            label,
            description,
            tuple(
                Figures(
                    chair + 0.012 * (seed - 1),
                    1.9 * chair,
                    recall + 0.01 * (seed - 1),
                    0.9 - chair / 2,
                    0.8 - chair / 2,
                    0.9 - chair / 3,
                    0.5 + chair / 4,
                )
                for seed in seeds
            ),
        )
        for name, (label, description, chair, recall) in VARIANTS.items()
    )
    return ReportData(
        title="Bootstrapped Preference Optimization on a small world",
        explanation="A tiny multimodal model with a language prior was taught to prefer what it sees.",
        seeds=seeds,
        variants=variants,
        headline="bpo",
        curves=sample_curves(),
        measures=MEASURES,
        training_examples=tuple(
            TrainingExample(
                id=f"train_{number}",
                prompt="Describe this image.",
                scene=scene(number),
                weakened=scene(number, 120.0),
                noise_step=900,
                chosen=mark_answer("chosen: annotation", "a photo with a rock and a leaf.", PRESENT, LEXICON),
                rejected=(
                    mark_answer("rejected: weakened image", text, PRESENT, LEXICON),
                    mark_answer("rejected: injected errors", "two stones, a mug, a bed.", PRESENT, LEXICON),
                ),
            )
            for number in range(3)
        ),
        evaluation_examples=tuple(
            EvaluationExample(
                id=f"eval_{number}",
                scene=scene(number),
                present=("rock", "leaf"),
                answers=(
                    mark_answer("base", "a photo with a rock, a tree and a cup.", PRESENT, LEXICON),
                    mark_answer("bpo", "a photo with a rock and a leaf.", PRESENT, LEXICON),
                ),
            )
            for number in range(4)
        ),
        stage_seconds={"world": 4.2, "base model": 101.5, "bootstrap": 60.3},
        versions={"bpo": "0.1.0", "torch": "2.13.0"},
    )


class Page(HTMLParser):
    """What a test asks of a page: its elements, the text inside marks, image sources."""

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.marked: list[str] = []
        self.text = ""
        self._in_mark = self._hidden = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "mark":
            self._in_mark = True
            self.marked.append("")
        self._hidden = self._hidden or (tag, dict(attrs).get("class")) == ("span", "unseen")

    def handle_endtag(self, tag: str) -> None:
        self._in_mark = self._in_mark and tag != "mark"
        self._hidden = self._hidden and tag != "span"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_mark and not self._hidden:
            self.marked[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


Browse = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Runs the browser on a page without letting it reach the network; returns its output."""

    def run(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
        assert BROWSER is not None
        offline = "--disable-background-networking --disable-component-update --disable-sync --no-first-run".split()
        command = [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            *offline,
            "--host-resolver-rules=MAP * ~NOTFOUND",
        ]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--hide-scrollbars", *flags]
        return subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=300, check=True)

    return run


def test_the_page_is_one_file_that_fetches_and_runs_nothing(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", sample())
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert not page.all("script")
    for _, attributes in page.elements:
        assert "style" not in attributes  # the policy would drop it
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in source and "@import" not in source


def test_text_is_escaped_everywhere(tmp_path: Path) -> None:
    data = sample(seeds=(0,), text=HOSTILE)
    hostile = Variant("base", HOSTILE, HOSTILE, data.variants[0].runs)
    example = EvaluationExample(HOSTILE, scene(0), (HOSTILE,), (MarkedAnswer(HOSTILE, HOSTILE, ((0, 8),), (HOSTILE,)),))
    changes = {
        "title": HOSTILE,
        "explanation": HOSTILE,
        "variants": (hostile, *data.variants[1:]),
        "evaluation_examples": (example,),
        "stage_seconds": {HOSTILE: 1.0},
        "versions": {HOSTILE: HOSTILE},
        "curves": (Curves("base", {"loss": ((1.0, 0.5),)}),),
        "measures": {"swap": TypeMeasures(warnings=(HOSTILE,))},
    }
    fields = {name: getattr(data, name) for name in data.__dataclass_fields__} | changes
    write_report(tmp_path / "report.html", ReportData(**fields))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not page.all("script")
    assert all((image["src"] or "").startswith("data:image/png") for image in page.all("img"))
    assert HOSTILE in page.text


def test_images_are_inlined_with_their_own_size_and_an_alternative_text(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", sample())
    images = Page((tmp_path / "report.html").read_text(encoding="utf-8")).all("img")
    assert len(images) == 4 + 3 * 2
    for image in images:
        assert image["alt"]
        encoded = (image["src"] or "").removeprefix("data:image/png;base64,")
        assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (48, 48)


def test_hallucinated_words_are_marked_in_place_and_missing_objects_listed() -> None:
    answer = mark_answer("base", "A tree, two mugs and a stone.", PRESENT, LEXICON)
    assert answer.pieces == (
        ("A ", False), ("tree", True), (", two ", False), ("mugs", True), (" and a stone.", False)
    )  # fmt: skip
    assert answer.missing == ("leaf",)


def test_several_seeds_show_median_and_range_one_seed_says_so(tmp_path: Path) -> None:
    write_report(tmp_path / "several.html", sample())
    several = Page((tmp_path / "several.html").read_text(encoding="utf-8")).text
    assert "Medians over 3 seeds (0, 1, 2)" in several
    assert "16.0 %" in several and "14.8–17.2" in several
    assert "\u221236 %" in several  # 0.25 -> 0.16
    write_report(tmp_path / "one.html", sample(seeds=(1,)))
    one = Page((tmp_path / "one.html").read_text(encoding="utf-8")).text
    assert "One seed (1)" in one and "–" not in one.split("Training")[0]


def test_curves_come_from_the_metrics_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n, "loss": 1 / n, "lr": 0.1}) + "\n" for n in (1, 2)))
    assert read_curves("bpo", path) == Curves("bpo", {"loss": ((1.0, 1.0), (2.0, 0.5))})
    path.write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match="line 1: field 'step' is None"):
        read_curves("bpo", path)
    points = [(float(step), float(step)) for step in range(1, 8)]
    assert thin_out(points, 3) == ((2.0, 2.0), (5.0, 5.0), (7.0, 7.0))
    assert thin_out(points, 7) == tuple(points)


def test_a_report_that_cannot_be_right_is_refused(tmp_path: Path) -> None:
    data = sample()
    fields = {name: getattr(data, name) for name in data.__dataclass_fields__}
    with pytest.raises(ValueError, match="headline 'best' is not among"):
        write_report(tmp_path / "r.html", ReportData(**fields | {"headline": "best"}))
    with pytest.raises(ValueError, match=r"one run per seed \(2\)"):
        write_report(tmp_path / "r.html", ReportData(**fields | {"seeds": (0, 1)}))


def test_it_renders_before_anything_was_trained(tmp_path: Path) -> None:
    data = sample(seeds=(0,))
    fields = {name: getattr(data, name) for name in data.__dataclass_fields__}
    nothing = {"curves": (), "measures": {}, "training_examples": (), "evaluation_examples": ()}
    flat = Variant("base", "Base", "", (Figures(*[0.0] * len(METRICS)),))
    write_report(tmp_path / "r.html", ReportData(**fields | nothing | {"variants": (flat,), "headline": "base"}))
    source = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "was 0" in source and "Measures of" not in source


def test_each_source_has_its_measures_with_plots_and_warnings(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", sample())
    source = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert 'aria-label="accuracy of the text alone: llm-hal 0.76; swap 0.47"' in source
    injected, swapped = (re.sub(r"<svg.*?</svg>", "", block) for block in source.split("<h3>")[1:])
    assert "injected errors: text alone 0.76 ± 0.01 · blind -1.70 nats, above 0: 36 % · seeing +7.40 nats" in injected
    assert '<p class="problem">llm-hal: tells</p>' in injected and 'class="problem"' not in swapped
    assert swapped.startswith("swap<") and "annotation of another image: text alone 0.47" in swapped
    for block in (injected, swapped):
        assert block.count("<figcaption>Log-probability with") == 2  # without and with the image


def test_every_model_has_a_colour_of_its_own(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", sample())
    source = (tmp_path / "r.html").read_text(encoding="utf-8")
    drawn = {int(number) for number in re.findall(r'class="bar series-(\d)"', source)}
    assert drawn == set(range(len(VARIANTS)))
    assert all(f".bar.series-{number} " in source and f"--s{number}: #" in source for number in drawn)


@needs_browser
def test_a_browser_shows_the_page_without_a_complaint(tmp_path: Path, browse: Browse) -> None:
    write_report(tmp_path / "report.html", sample())
    shown = browse(tmp_path / "report.html", "--dump-dom")
    assert not re.findall(r".*:CONSOLE.*", shown.stderr)
    page = Page(shown.stdout)
    rows = [html.unescape(re.sub(r"<[^>]+>", " ", row)) for row in re.findall(r"<tr.*?</tr>", shown.stdout, re.S)]
    (bpo_row,) = [row.split() for row in rows if " BPO " in row]
    assert "16.0" in bpo_row and "14.8–17.2" in bpo_row and "72.0" in bpo_row
    assert page.marked.count("tree") == 3 + 4 and page.marked.count("bed") == 3
    assert "rock" not in page.marked and "stones" not in page.marked
    assert len([svg for svg in page.all("svg") if svg.get("role") == "img"]) == len(METRICS) + len(
        CURVES
    ) + 2 + 2 * len(MEASURES)
    assert "Total166.0" in page.text


@needs_browser
@pytest.mark.parametrize("width, scheme", [(1200, "light"), (1200, "dark"), (500, "light")])
def test_a_browser_paints_pictures_charts_and_marks(tmp_path: Path, browse: Browse, width: int, scheme: str) -> None:
    write_report(tmp_path / "report.html", sample())
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    browse(tmp_path / "report.html", f"--window-size={width},9300", f"--screenshot={tmp_path / 'shot.png'}", *dark)
    shot_HW3 = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)

    def count(colour: tuple[int, int, int]) -> int:
        return int((abs(shot_HW3 - np.array(colour)).max(-1) <= 2).sum())

    assert count(MAGENTA) > 7 * 40 * 40  # the clean scenes are painted, enlarged
    background, wrong, bpo = {
        "light": ((251, 250, 247), (253, 231, 229), (33, 88, 201)),
        "dark": ((20, 23, 28), (69, 32, 29), (126, 164, 255)),
    }[scheme]
    assert tuple(shot_HW3[2, 2]) == background  # the style sheet passed its own policy
    assert count(wrong) > 500  # marked words have a ground of their own
    assert count(bpo) > 12_000  # BPO's bars
