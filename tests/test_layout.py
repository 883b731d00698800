"""Pitfalls of the layout, and one-way imports."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# Every module or folder directly under bpo/. Each may import those of the lines above it; those of one line are
# independent of each other.
LAYERS = (
    "config records",
    "job",
    "formats",
    "data",
    "model",
    "losses",
    "bootstrap engine evaluation",
    "ranking training",
    "checkpoint",
    "train",
    "rounds",
    "tools",
    "cli",
)
# Not always installed, but imported by transformers, peft or deepspeed if they are.
THIRD_PARTY = set(
    "datasets evaluate kernels accelerate bitsandbytes wandb mlflow apex cupy scipy sklearn pandas tokenizers "
    "tiktoken flash_attn xformers timm torchvision torchaudio optimum trl vllm mpi4py ray soundfile librosa av "
    "cv2 jax flax tensorflow onnx coverage build wheel comet_ml clearml swanlab dvclive trackio attention "
    "utils version test tests".split()
)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """(absolute module name, line) of each import in `path`, including those inside functions."""
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            yield ".".join(module), node.lineno
            yield from ((".".join([*module, alias.name]), node.lineno) for alias in node.names)


def layer_name(path: Path) -> str:
    """`bpo/data/schedule.py` -> `data`, `bpo/train.py` -> `train`."""
    return path.relative_to(ROOT / "bpo").parts[0].removesuffix(".py")


def run_python(code: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env={**os.environ, **env}, timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_kernels_never_becomes_a_real_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "kernels/__init__.py makes `import kernels` find our folder; transformers then fails to import its models"
    )
    assert not list((ROOT / "bpo").glob("kernels*")), "`deepspeed bpo/train.py` would import bpo/kernels as `kernels`"


def test_modules_of_bpo_shadow_no_other_package() -> None:
    """`deepspeed bpo/train.py` puts bpo/ first on sys.path, so each name in it hides a top-level import."""
    installed = set(importlib.metadata.packages_distributions()) - {"bpo", "bpo_kernels", "bpo_ds_configs"}
    taken = set(sys.stdlib_module_names) | installed | THIRD_PARTY
    ours = {path.stem for path in (ROOT / "bpo").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not ours & taken - {"__init__"}, f"rename in bpo/: {sorted(ours & taken)}"


def test_transformers_is_unharmed_with_the_root_on_the_path() -> None:
    """`python -m`, pytest and DeepSpeed's multi-node launcher put the root on the path, and with it `kernels/`."""
    code = (
        "import importlib.util, json\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "from transformers.utils import is_kernels_available\n"
        "available = is_kernels_available()\n"
        "from transformers import LlamaForCausalLM, LlavaForConditionalGeneration\n"
        "print(json.dumps([spec.origin if spec else None, available]))"
    )
    origin, available = json.loads(run_python(code, PYTHONPATH=str(ROOT)).splitlines()[-1])
    assert origin is None or "site-packages" in origin, f"`import kernels` finds {origin}"
    assert isinstance(available, bool)


def test_kernels_are_importable_under_their_own_name_from_anywhere() -> None:
    where = run_python("import bpo_kernels, bpo; print(list(bpo_kernels.__path__)[0]); print(bpo.__file__)").split()
    assert Path(where[0]).name in ("kernels", "bpo_kernels") and Path(where[1]).name == "__init__.py"


def test_import_bpo_is_light() -> None:
    heavy = run_python(
        "import sys, bpo; print([m for m in ('torch', 'deepspeed', 'triton', 'transformers') if m in sys.modules])"
    )
    assert heavy.strip() == "[]"


def test_every_module_imports() -> None:
    """Catches a name that is used but never imported in a module no other test touches."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in python_files("bpo", "kernels")]
    names = [name.replace("kernels.", "bpo_kernels.", 1) if name.startswith("kernels.") else name for name in names]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    code = f"import importlib\nfor name in {names}:\n    importlib.import_module(name)\nprint('all')"
    assert run_python(code).split()[-1] == "all"


def test_imports_go_one_way() -> None:
    layer_of = {name: number for number, names in enumerate(LAYERS) for name in names.split()}
    uphill = []
    for path in python_files("bpo"):
        if path == ROOT / "bpo" / "__init__.py":
            continue
        source = layer_name(path)
        assert source in layer_of, f"{relative(path)}: give `{source}` a layer in {relative(Path(__file__))}"
        for module, line in imports_of(path):
            target = module.split(".")[1] if module.startswith("bpo.") else source
            if target in layer_of and target != source and layer_of[target] >= layer_of[source]:
                uphill.append(f"{relative(path)}:{line} imports {module}")
    assert not uphill, "\n".join(uphill)


def test_kernels_know_nothing_of_bpo() -> None:
    guilty = [
        f"{relative(path)}:{line} imports {module}"
        for path in python_files("kernels")
        for module, line in imports_of(path)
        if module.split(".")[0] == "bpo"
    ]
    assert not guilty, "\n".join(guilty)


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("triton", ("kernels/",)),
        ("deepspeed", ("bpo/engine.py", "bpo/checkpoint/")),
        ("bpo.tools", ("bpo/tools/", "bpo/cli.py")),
    ],
)
def test_only_these_files_import(package: str, allowed: tuple[str, ...]) -> None:
    guilty = [
        f"{relative(path)}:{line} imports {module}"
        for path in python_files("bpo", "kernels")
        for module, line in imports_of(path)
        if f"{module}.".startswith(f"{package}.") and not relative(path).startswith(allowed)
    ]
    assert not guilty, f"only {', '.join(allowed)} may import {package}:\n" + "\n".join(guilty)


def test_files_and_functions_stay_readable() -> None:
    too_long = []
    for path in python_files("bpo", "kernels", "tests"):
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MAX_FILE_LINES:
            too_long.append(f"{relative(path)}: {len(text.splitlines())} lines, at most {MAX_FILE_LINES}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and not _is_triton_kernel(node):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    too_long.append(f"{relative(path)}:{node.lineno} {node.name}: {num_lines} lines, at most 60")
    assert not too_long, "\n".join(too_long)


def _is_triton_kernel(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)
