"""Packs the packages missing on a GPU machine without a network; run it online, with the same Python version.

    python3.12 benchmarks/offline/pack.py [--image FILE]    .wheels/: requirements of bpo and its tests, about 10 MiB
    python3.12 benchmarks/offline/pack.py --quack           .wheels-quack/: QuACK and NVIDIA's CuTe DSL, about 50 MiB,
                                                            for a separate run; xz takes about 8 minutes

Copy the checkout with these folders to the GPU machine and run benchmarks/offline/run.sh there. pip resolves the
requirements of setup.py (extras `peers` and `test`) in an environment that pretends to have the packages of the image,
with the versions of constraints.txt for all others; nothing is installed here.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "offline"))

import stamp  # noqa: E402

WHEELS, QUACK = ROOT / ".wheels", ROOT / ".wheels-quack"
MAX_MIB = 20.0
# In order of preference: run.sh uses the first one that can be imported.
QUACK_VERSIONS = ("0.6.5", "0.6.0")
QUACK_NEEDS = ("apache-tvm-ffi", "torch-c-dlpack-ext")
CUTE = ("nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base", "nvidia-cutlass-dsl-libs-core")
CUTE_COMPILER = "nvidia-cutlass-dsl-libs-cu12"
# Not needed: stub libraries (nothing is linked at run time) and the bridge for torch before 2.10.
LEFT_OUT = ("*/cu12/lib/stubs", "torch_c_dlpack_ext/*torch2[4-9]*")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(path: Path) -> dict[str, str]:
    """{canonical name: version, or "" if the line has none} of a requirements file."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.partition("==") for line in lines if line)
    return {canonical(name): version.strip() for name, _, version in pairs}


def pip(python: Path | str, *words: str) -> None:
    """Runs pip quietly; pip prints its own error messages.

    Raises:
        SystemExit: pip failed.
    """
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *words]
    environment = {**os.environ, "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    if subprocess.run(command, env=environment, check=False).returncode:
        sys.exit(f"error: `{' '.join(command)}` failed; see above")


def pretend_installed(site_packages: Path, image: dict[str, str], pins: dict[str, str]) -> None:
    """Writes metadata of the image's packages, without requirements, so that pip treats them as installed."""
    for name, version in image.items():
        version = version or pins.get(name) or "9999"
        folder = site_packages / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (folder / "INSTALLER").write_text("pack.py\n")
        (folder / "RECORD").write_text("")


def resolve(work: Path, image: dict[str, str], pins: dict[str, str]) -> list[str]:
    """`name==version` of every requirement of bpo that the image lacks."""
    environment = work / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    pretend_installed(environment / "lib" / version / "site-packages", image, pins)
    constraints = work / "constraints.txt"
    constraints.write_text("".join(f"{name}=={pin}\n" for name, pin in pins.items() if name not in image))
    # A copy, because setuptools writes into the source tree.
    source = work / "bpo"
    source.mkdir()
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source)
    for name in ("bpo", "kernels", "ds_configs"):
        shutil.copytree(ROOT / name, source / name)
    report = work / "report.json"
    words = ["--quiet", "--dry-run", "--report", str(report), "--constraint", str(constraints)]
    pip(python, "install", *words, "--find-links", str(WHEELS), f"{source}[peers,test]")
    found = (item["metadata"] for item in json.loads(report.read_text())["install"])
    return sorted(
        f"{package['name']}=={package['version']}" for package in found if canonical(package["name"]) != "bpo"
    )


def pack_wheels(image_file: Path) -> None:
    image, pins = read_pins(image_file), read_pins(ROOT / "constraints.txt")
    shutil.rmtree(WHEELS, ignore_errors=True)
    WHEELS.mkdir()
    # On PyPI only as source; without prebuilt operators its wheel is plain Python and compiles them on first use.
    deepspeed = f"deepspeed=={pins['deepspeed']}"
    pip(sys.executable, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(WHEELS), deepspeed)
    with tempfile.TemporaryDirectory() as folder:
        wanted = [name for name in resolve(Path(folder), image, pins) if name != deepspeed]
    pip(
        sys.executable, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(WHEELS), "pip", *wanted
    )
    stamp.write(WHEELS)
    wheels = sorted(WHEELS.glob("*.whl"))
    total = sum(path.stat().st_size for path in wheels) / 2**20
    for path in wheels:
        print(f"{path.stat().st_size / 2**20:7.2f} MiB  {path.name}")
    print(f"{total:7.2f} MiB  in {len(wheels)} wheels, commit {stamp.read(WHEELS)}")
    if total > MAX_MIB:
        sys.exit(f"error: more than {MAX_MIB:.0f} MiB; is {image_file} the list of the GPU machine's packages?")


def pack_quack() -> None:
    pins = read_pins(ROOT / "constraints.txt")
    shutil.rmtree(QUACK, ignore_errors=True)
    QUACK.mkdir()
    names = [f"{name}=={pins[name]}" for name in (*CUTE, CUTE_COMPILER, *QUACK_NEEDS)]
    with tempfile.TemporaryDirectory() as folder:
        work, tree = Path(folder), Path(folder) / "tree"
        install = ["install", "--quiet", "--no-deps", "--only-binary=:all:", "--no-compile", "--target"]
        pip(sys.executable, *install, str(tree / "common"), *names)
        for version in QUACK_VERSIONS:
            pip(sys.executable, *install, str(tree / f"quack-{version}"), f"quack-kernels=={version}")
        for pattern in LEFT_OUT:
            for path in (tree / "common").glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        archive = work / "quack.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(tree, arcname=".")
        filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 256 * 2**20}]
        with archive.open("rb") as source, lzma.open(QUACK / "quack.tar.xz", "wb", filters=filters) as packed:
            shutil.copyfileobj(source, packed, 2**20)
    stamp.write(QUACK)
    size = (QUACK / "quack.tar.xz").stat().st_size / 2**20
    print(f"{size:7.2f} MiB  quack.tar.xz, commit {stamp.read(QUACK)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "benchmarks" / "offline" / "image.txt"
    parser.add_argument("--image", type=Path, metavar="FILE", default=default, help="packages of the GPU machine")
    parser.add_argument("--quack", action="store_true", help="pack QuACK and its compiler instead")
    options = parser.parse_args()
    if options.quack:
        pack_quack()
    else:
        pack_wheels(options.image)


if __name__ == "__main__":
    main()
