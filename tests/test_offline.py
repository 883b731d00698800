"""The offline GPU machine: its package and the run script, without network and git."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmarks.offline import pack, stamp
from bpo_kernels.provenance import UNKNOWN

# Replaces benchmarks/gpu.py: reports its environment.
GPU_SET = """
import json, os, shutil, sys
import bpo_kernels, packed_tool, torch
from bpo_kernels.provenance import source_commit
names = ("PYTHONPATH", "HF_HUB_OFFLINE", "TORCH_EXTENSIONS_DIR", "PYTHONUNBUFFERED")
print(json.dumps({
    "arguments": sys.argv[1:],
    "commit": source_commit(),
    "kernels": list(bpo_kernels.__path__)[0],
    "launcher": shutil.which("packed-tool"),
    "python": sys.executable,
    **{name: os.environ.get(name) for name in names},
}))
sys.exit(3)
"""


def write_wheel(folder: Path) -> None:
    """A wheel with a module and a program, like DeepSpeed's."""
    info = "packed_tool-1.0.dist-info"
    files = {
        "packed_tool.py": "def main():\n    print('packed')\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: packed-tool\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\npacked-tool = packed_tool:main\n",
    }
    record = [f"{info}/RECORD,,"]
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{len(text)}")
    files[f"{info}/RECORD"] = "\n".join(record) + "\n"
    folder.mkdir()
    with zipfile.ZipFile(folder / "packed_tool-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)


@pytest.fixture
def checkout(tmp_path: Path, repo_root: Path) -> Path:
    root = tmp_path / "a checkout"
    (root / "benchmarks").mkdir(parents=True)
    shutil.copytree(repo_root / "benchmarks" / "offline", root / "benchmarks" / "offline")
    shutil.copytree(repo_root / "kernels", root / "kernels")
    shutil.copytree(repo_root / "checkout", root / "checkout", symlinks=True)
    (root / "benchmarks" / "gpu.py").write_text(GPU_SET)
    return root


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A PATH with the usual Linux programs, without git and a Python environment."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("bash", "dirname", "mktemp", "rm"):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return folder


def offline(root: Path, programs: Path, *words: str) -> subprocess.CompletedProcess[str]:
    temporary = root.parent / "temporary"
    temporary.mkdir(exist_ok=True)
    environment = {"PATH": str(programs), "PYTHON": sys.executable, "TMPDIR": str(temporary)}
    environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "HOME") if name in os.environ}
    command = ["bash", str(root / "benchmarks" / "offline" / "run.sh"), *words]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=300)


def test_run_finds_wheels_launcher_sources_and_commit_and_leaves_nothing(checkout: Path, programs: Path) -> None:
    write_wheel(checkout / ".wheels")
    stamp.write(checkout / ".wheels", root=checkout)
    (checkout / ".wheels" / "COMMIT").write_text(f"feedc0de {stamp.digest(checkout)}\n")
    result = offline(checkout, programs, "--seconds", "540")
    assert result.returncode == 3, result.stderr  # the set's own
    seen = json.loads(result.stdout.splitlines()[-1])
    assert seen["arguments"] == ["--seconds", "540"]
    assert seen["commit"] == "feedc0de"
    assert Path(seen["kernels"]).resolve() == checkout / "kernels"
    assert Path(seen["launcher"]).parent == Path(seen["python"]).parent  # where the tests look for deepspeed
    assert seen["PYTHONPATH"] == str(checkout / "checkout")
    assert (seen["HF_HUB_OFFLINE"], seen["PYTHONUNBUFFERED"]) == ("1", "1")
    assert seen["TORCH_EXTENSIONS_DIR"].startswith(str(checkout.parent / "temporary"))
    assert list((checkout.parent / "temporary").iterdir()) == []


def test_run_takes_the_newest_quack_that_imports(checkout: Path, programs: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for version, text in (("0.9.0", "import not_there\n"), ("0.10.0", "raise TypeError('no key')\n"), ("0.8.1", "")):
        package = tree / f"quack-{version}" / "quack"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(text)
        (package / "linear_cross_entropy.py").write_text(f"import cutlass\nprint('{version}', cutlass.__file__)\n")
    (tree / "common").mkdir()
    (tree / "common" / "cutlass.py").touch()
    (checkout / ".wheels-quack").mkdir()
    with tarfile.open(checkout / ".wheels-quack" / "quack.tar.xz", "w:xz") as archive:
        archive.add(tree, arcname=".")
    for name in ("mkdir", "sort", "tail"):
        (programs / name).symlink_to(str(shutil.which(name)))
    result = offline(checkout, programs, "-m", "quack.linear_cross_entropy")
    assert "quack-0.10.0 does not import here: TypeError: no key" in result.stderr
    assert "quack-0.9.0 does not import here: ModuleNotFoundError" in result.stderr
    assert "0.8.1 " in result.stdout and "/site-packages/" in result.stdout, result.stderr


def test_run_takes_another_module(checkout: Path, programs: Path) -> None:
    write_wheel(checkout / ".wheels")
    result = offline(checkout, programs, "-m", "base64", "-h")
    assert "base64" in result.stdout + result.stderr and "arguments" not in result.stdout


def test_run_says_what_is_missing(checkout: Path, programs: Path) -> None:
    result = offline(checkout, programs)
    assert result.returncode == 1 and "benchmarks/offline/pack.py" in result.stderr
    script = checkout / "benchmarks" / "offline" / "run.sh"
    result = subprocess.run(
        ["bash", str(script)], env={"PATH": str(programs), "PYTHON": "/nowhere/python"}, capture_output=True, text=True
    )
    assert result.returncode == 1 and "PYTHON=/path/to/python3" in result.stderr


def test_stamp_tells_a_tree_that_changed_after_packing(checkout: Path) -> None:
    folder = checkout / ".wheels"
    folder.mkdir()
    assert stamp.read(folder, root=checkout) == UNKNOWN
    (folder / "COMMIT").write_text(f"feedc0de {stamp.digest(checkout)}\n")
    (checkout / "benchmarks" / "results").mkdir()
    (checkout / "benchmarks" / "results" / "new.json").write_text("{}")  # files written by a run change nothing
    assert stamp.read(folder, root=checkout) == "feedc0de"
    (checkout / "kernels" / "head.py").write_text("changed = True\n")
    assert stamp.read(folder, root=checkout) == "feedc0de+changes"


def test_image_is_taken_as_installed_and_only_the_rest_is_pinned(tmp_path: Path) -> None:
    image = tmp_path / "image.txt"
    image.write_text("# a comment\nTorch==2.11.0\nhuggingface_hub==1.33.0  # why\nninja\n")
    found = pack.read_pins(image)
    assert found == {"torch": "2.11.0", "huggingface-hub": "1.33.0", "ninja": ""}
    pack.pretend_installed(tmp_path, found, {"ninja": "1.13.2"})
    command = [sys.executable, "-m", "pip", "list", "--path", str(tmp_path), "--format=json"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    versions = {pack.canonical(package["name"]): package["version"] for package in listed}
    assert versions == {"torch": "2.11.0", "huggingface-hub": "1.33.0", "ninja": "1.13.2"}


def required(repo_root: Path) -> list[str]:
    """REQUIRES of setup.py, read without running it."""
    for node in ast.parse((repo_root / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REQUIRES":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py has no REQUIRES")


def test_committed_image_is_at_or_above_the_floors_of_setup(repo_root: Path) -> None:
    """Otherwise pip would pack another torch."""
    from packaging.requirements import Requirement

    image = pack.read_pins(repo_root / "benchmarks" / "offline" / "image.txt")
    for requirement in map(Requirement, required(repo_root)):
        version = image.get(pack.canonical(requirement.name))
        assert not version or requirement.specifier.contains(version), f"{requirement} against {version}"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
@pytest.mark.parametrize("script", ["benchmarks/offline/run.sh", ".ci/run", ".ci/venv"])
def test_scripts_pass_shellcheck(script: str, repo_root: Path) -> None:
    result = subprocess.run(["shellcheck", str(repo_root / script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_one_line_runs_a_clone_that_is_not_installed(repo_root: Path, tmp_path: Path) -> None:
    """`export PYTHONPATH=$PWD/checkout`: the links take precedence over an installation, from any directory."""
    code = (
        "import bpo, bpo_kernels, importlib.resources as r; from bpo.engine import find_ds_config\n"
        "from bpo.job.run_record import versions; assert versions()['bpo'] == bpo.__version__\n"
        "print(bpo.__file__, list(bpo_kernels.__path__)[0], find_ds_config('zero3.json'), sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(repo_root / "checkout")}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": True}
    found = subprocess.run([sys.executable, "-c", code], **options).stdout.splitlines()
    links = repo_root / "checkout"
    expected = [links / "bpo" / "__init__.py", links / "bpo_kernels", links / "bpo_ds_configs" / "zero3.json"]
    assert [Path(line) for line in found] == expected
    help_text = subprocess.run([sys.executable, "-m", "bpo.cli", "--help"], **options).stdout
    assert "bpo COMMAND" in help_text
