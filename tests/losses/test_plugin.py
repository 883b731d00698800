"""Plug-ins: docs/examples/plugin.py in this process and in a worker's, installed ones, and faulty ones."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import pickle
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from torch.nn.functional import softplus

from bpo.config.io import load_config
from bpo.config.loss import LossConfig
from bpo.data.cells import PAIR_RULES, Cell, CellPlan
from bpo.data.collate import collate_groups
from bpo.data.encode import EncodedGroup
from bpo.data.groups import GroupDataset
from bpo.data.token_weights import TOKEN_RULES
from bpo.data.views import _PLUGIN_VIEWS
from bpo.job.plugins import _loaded
from bpo.losses.plugin import load_plugin, plugin_digest
from bpo.losses.program import HeadOutput, LossProgram
from bpo.losses.registry import LOSSES, WEIGHINGS
from tests.conftest import ROOT
from tests.losses.batches import GROUPS, Batch, views_of
from tests.sample_groups import encoder_of, group

EXAMPLE = ROOT / "docs" / "examples" / "plugin.py"
EVERY_ENTRY = {
    "plugin": str(EXAMPLE),
    "beta": 0.5,
    "views": {"mirror": {"type": "mirrored"}},
    "terms": [
        {"type": "exponential", "options": {"scale": 0.1}, "weighting": "confident", "pairs": "first"},
        {"type": "sigmoid", "pairs": "image", "against": "mirror"},
        {"type": "sigmoid", "token_weights": "beginning", "options": {"count": 1}},
    ],
}
LOSS = "from bpo.losses.plugin import register_loss\n\nregister_loss({name!r})(lambda values: values.{field})\n"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a test loads and registers is forgotten after it."""
    with ExitStack() as stack:
        for registered in (LOSSES, WEIGHINGS, PAIR_RULES, TOKEN_RULES, _PLUGIN_VIEWS, _loaded):
            stack.enter_context(patch.dict(registered))
        yield


def example_loss(tmp_path: Path) -> LossConfig:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"loss": EVERY_ENTRY}))
    return load_config(["--config", str(path)]).loss


def plugin_file(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_every_entry_of_the_example_is_used_from_yaml(tmp_path: Path) -> None:
    groups = [replace(one, views=views_of("mirror")) for one in GROUPS]
    batch = Batch(example_loss(tmp_path), groups)
    assert batch.program.names == ("exponential", "sigmoid", "sigmoid_2")
    total = torch.zeros((), dtype=torch.float64)
    for number, better, worse, weight, factor in ((0, 0, 1, 1.0, 0.5), (0, 0, 2, 2.0, 2.0), (1, 0, 1, 1.0, 1.0)):
        beta, chosen, rejected = 0.5 * factor, Cell("", better), Cell("", worse)
        margin = batch.ratio(number, chosen) - batch.ratio(number, rejected)
        if worse == 1:  # the first pair of its group
            confident = batch.logp(number, chosen).mean().exp().detach()
            total = total + weight * confident * torch.exp(-0.1 * beta * margin)
        image = batch.ratio(number, chosen) - batch.ratio(number, Cell("mirror", better))
        first = [(batch.logp(number, cell) - batch.reference(number, cell))[0] for cell in (chosen, rejected)]
        total = total + weight * (softplus(-beta * image) + softplus(-beta * (first[0] - first[1])))
    batch.assert_same(batch.output().total, total)


def encoded(found: Any) -> tuple[EncodedGroup, torch.Tensor]:
    assert isinstance(found, EncodedGroup)
    return found, found.views[0].prompt.image_inputs["pixel_values"]


def test_worker_processes_that_inherit_nothing_have_the_plug_in_too(
    tiny_llava_dir: Path, photo_root: Path, tmp_path: Path
) -> None:
    """As those of a data loader where processes are not forked."""
    plan = LossProgram(example_loss(tmp_path), seed=3).plan
    groups = [group("a", "a cat", "a dog", "no", image="square.png")]
    dataset = GroupDataset(groups, encoder_of(tiny_llava_dir, photo_root), max_words=350, types=(), plan=plan)
    here, mirrored = encoded(dataset.encode(0))
    torch.testing.assert_close(mirrored, here.prompt.image_inputs["pixel_values"].flip(-1), atol=0.05, rtol=0)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as workers:
        there, pixels = encoded(workers.submit(dataset.encode, 0).result(timeout=200))
        assert torch.equal(pixels, mirrored) and there.completion_ids == here.completion_ids
        # The cells of its own pair rule.
        assert workers.submit(dataset.measure, 0).result(timeout=200) == dataset.measure(0)


def test_a_worker_refuses_another_version_of_the_file(tmp_path: Path) -> None:
    path = plugin_file(tmp_path, LOSS.format(name="mine", field="beta_P"))
    plan = LossProgram(LossConfig(type="mine", plugin=str(path))).plan
    sent = pickle.dumps(plan)
    assert pickle.loads(sent) == plan  # in this process it is loaded already
    LOSSES.pop("mine")
    _loaded.clear()  # as in a new process
    path.write_text(LOSS.format(name="mine", field="margin_P"))
    with pytest.raises(ValueError, match=r"mine\.py: the file has changed since this job started; start the job again"):
        pickle.loads(sent)


def test_the_plan_names_the_plug_ins_source(tmp_path: Path) -> None:
    path = plugin_file(tmp_path, LOSS.format(name="mine", field="beta_P"))
    plan = LossProgram(LossConfig(type="mine", plugin=str(path))).plan
    assert plan.identity == load_plugin(str(path)) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert LossProgram(LossConfig()).plan.identity == load_plugin("") == plugin_digest("") == CellPlan().identity == ""
    other = plugin_file(tmp_path, LOSS.format(name="other", field="beta_P"), "other.py")
    assert load_plugin(str(other)) != load_plugin(str(path))


def test_a_plug_in_runs_once_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"open({str(tmp_path / 'log')!r}, 'a').write('run ')\n" + LOSS.format(name="mine", field="beta_P")
    path = plugin_file(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    digests = {load_plugin(name) for name in (str(path), "mine.py", "./mine.py", str(path))}
    LossProgram(LossConfig(type="mine", plugin="mine.py"))
    path.write_text("raise ValueError\n")  # the fingerprint of a run is that of the code that runs
    assert digests == {load_plugin("mine.py")} and (tmp_path / "log").read_text() == "run "


FAULTY = [
    ("x = 1\ndef f(:\n    pass\n", "line 2: SyntaxError: invalid syntax"),
    ("x = 1\n\ny = {}['z']\n", "line 3: KeyError: 'z'"),
    ("def f():\n    raise RuntimeError('no')\n\n\nf()\n", "line 2: RuntimeError: no"),
    ("import json\n\njson.loads('{')\n", "line 3: JSONDecodeError: "),
    ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    ("x = 1\ny = '\xe9'\n".encode("latin-1"), "line 2: SyntaxError: (unicode error) 'utf-8' codec can't decode"),
    ("x = 1\nimport broken_helper\n", "line 2: SyntaxError: invalid syntax (broken_helper.py, line 1)"),
    (LOSS.format(name="sigmoid", field="beta_P"), "line 3: ValueError: a loss named 'sigmoid' is already registered"),
]


@pytest.mark.parametrize(("text", "message"), FAULTY, ids=lambda value: str(value)[:20])
def test_a_faulty_plug_in_is_named_with_its_line(
    text: str | bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    plugin_file(tmp_path, "def f(:\n", "broken_helper.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    with pytest.raises(ValueError, match=rf"^loss\.plugin {re.escape(str(path))}: .*{re.escape(message)}"):
        LossProgram(LossConfig(plugin=str(path)))
    assert not [name for name in set(sys.modules) - before if name.startswith("bpo_plugin_")]


@pytest.mark.parametrize(
    ("register", "taken"),
    [
        ("register_loss('nll')", "a loss named 'nll'"),
        ("register_weighting('wpo')", "a weighting named 'wpo'"),
        ("register_pairs('text')", "a rule for pairs named 'text'"),
        ("register_token_weights('data')", "a rule for token weights named 'data'"),
        ("register_view('crop')", "a view type named 'crop'"),
    ],
)
def test_a_name_that_is_taken(register: str, taken: str, tmp_path: Path) -> None:
    path = plugin_file(tmp_path, f"from bpo.losses.plugin import *\n\n{register}(lambda *_: None)\n")
    with pytest.raises(ValueError, match=f"mine.py: line 3: ValueError: {taken} is already registered"):
        load_plugin(str(path))


def test_a_plug_in_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"loss\.plugin gone\.py: no such file \(.*{re.escape('/gone.py')}\)"):
        LossProgram(LossConfig(plugin="gone.py"))
    with pytest.raises(ValueError, match=r"plugin gone: neither a \.py file nor an entry point of bpo\.losses \("):
        LossProgram(LossConfig(plugin="gone"))


def installed(folder: Path, entries: str, files: dict[str, str]) -> None:
    """A distribution as pip installs it."""
    info = folder / "mylosses-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mylosses\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[bpo.losses]\n{entries}")
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_an_installed_plug_in_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"from .helpers import FIELD\n{LOSS.format(name='mine', field='beta_P')}"
    files = {
        "bpo_my/__init__.py": "from . import losses\n",
        "bpo_my/losses.py": text,
        "bpo_my/helpers.py": "FIELD = 1\n",
    }
    modules = {"mine": "bpo_my.losses", "lost": "bpo_gone.losses", "broken": "bpo_my.broken", "below": "bpo_bad.losses"}
    entries = "".join(f"{name} = {module}\n" for name, module in modules.items())
    installed(tmp_path, entries, {**files, "bpo_my/broken.py": "x = 1\n1 / 0\n", "bpo_bad/__init__.py": "1 / 0\n"})
    monkeypatch.syspath_prepend(str(tmp_path))
    with patch.dict(sys.modules):
        program = LossProgram(LossConfig(type="mine", plugin="mine", beta=0.25))
        assert program.terms[0].definition.name == "mine"
        assert load_plugin("mine") == hashlib.sha256(text.encode()).hexdigest() == program.plan.identity
        assert sys.modules["bpo_my.losses"].FIELD == 1
        assert pickle.loads(pickle.dumps(program.plan)) == program.plan
        with pytest.raises(ValueError, match=r"plugin broken: line 2: ZeroDivisionError: division by zero"):
            load_plugin("broken")
        for name, module, error in (("lost", "bpo_gone", "ModuleNotFound"), ("below", "bpo_bad", "ZeroDivision")):
            with pytest.raises(
                ValueError, match=f"{name}: its module {module}.losses cannot be imported: {error}Error: "
            ):
                load_plugin(name)
        with pytest.raises(ValueError, match=r"plugin unknown: .* \(below, broken, lost, mine\)"):
            load_plugin("unknown")


def test_an_entry_point_of_something_that_is_no_python_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, "builtin = sys\nnone = bpo_no_such_module\n", {})
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, module in (("builtin", "sys"), ("none", "bpo_no_such_module")):
        with pytest.raises(ValueError, match=f"loss.plugin {name}: its module {module} is not a Python file"):
            load_plugin(name)


def test_the_example_of_the_documentation_works_as_written(
    tmp_path: Path, tiny_llava_dir: Path, photo_root: Path
) -> None:
    encoder = encoder_of(tiny_llava_dir, photo_root)
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split("## Your own loss, rule or view")[1]
    code, options = (re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)[1] for language in ("python", "yaml"))  # type: ignore[index]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 10
    (tmp_path / "my_loss.py").write_text(code)
    (tmp_path / "run.yaml").write_text(options.replace("my_loss.py", str(tmp_path / "my_loss.py")))
    program = LossProgram(load_config(["--config", str(tmp_path / "run.yaml")]).loss)
    dataset = GroupDataset([group("a", "a cat", "a dog")], encoder, max_words=9, types=(), plan=program.plan)
    encoded = dataset.encode(0)
    assert isinstance(encoded, EncodedGroup)
    clean, blurred = (v.image_inputs["pixel_values"] for v in (encoded.prompt, encoded.views[0].prompt))
    assert blurred.std() < 0.9 * clean.std()  # the picture, as the plug-in blurs it
    inputs = collate_groups([encoded], encoder.family, program.plan).loss_inputs
    zeros_N = torch.zeros(int(inputs.completion_starts_K1[-1]))
    output = program.apply(HeadOutput(None, zeros_N), replace(inputs, reference=zeros_N))
    assert output.term_sums_T.tolist() == pytest.approx([1.0, math.log(2)])
