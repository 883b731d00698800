"""One private cluster and one user directory on it, for all tests of this folder."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cluster.slurm_cluster import PrivateCluster, missing_programs

ROOT = Path(__file__).resolve().parent.parent.parent
NUM_IMAGES, EPOCHS, GROUPS_PER_STEP = 16, 7, 4
NUM_STEPS = EPOCHS * NUM_IMAGES // GROUPS_PER_STEP
SITE = """\
BPO_SBATCH_ARGS=(--ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1)
BPO_BOOTSTRAP_SBATCH_ARGS=(--array=0-1)
BPO_RANK_SBATCH_ARGS=(--array=0-1)
BPO_TRAIN_SBATCH_ARGS=(--nodes=2)
BPO_EVALUATE_SBATCH_ARGS=(--nodes=2)
BPO_COMMAND_SBATCH_ARGS=(--gpus-per-node=0)
BPO_PYTHON="{python}"
export PATH="{bin}:$PATH"
export DS_ACCELERATOR=cpu GLOO_SOCKET_IFNAME=lo
"""


# In the submission directory, as the configuration names it.
PLUGIN = """\
from torch.nn.functional import softplus

from bpo.losses.plugin import register_loss


@register_loss("own_sigmoid")
def own_sigmoid(values):
    return softplus(-values.delta_P)
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The top conftest looks for the commands of a user; these tests start daemons as well."""
    missing = missing_programs()
    if missing:
        reason = f"needs Slurm and munge (Debian: apt install slurm-wlm munge); missing: {', '.join(missing)}"
        for item in items:
            if item.get_closest_marker("cluster"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster() -> Iterator[PrivateCluster]:
    # Not below pytest's own folder: its path may be too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="bpo-slurm-"))
    try:
        with PrivateCluster(folder / "c", num_nodes=2) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's submission directory: data, a model, a clone's slurm/ with site settings; a space in the path."""
    from tests.tiny import tiny_llava

    home = tmp_path_factory.mktemp("cluster") / "my runs"
    tiny_llava(home / "base model")
    shutil.copytree(ROOT / "slurm", home / "clone" / "slurm")
    site = SITE.format(python=sys.executable, bin=Path(sys.executable).parent)
    (home / "clone" / "slurm" / "site.env").write_text(site)
    write_data(home)
    return home


def write_data(home: Path) -> None:
    """Annotations of random pictures, COCO instances and POPE questions about them; a plug-in; the configuration."""
    rng = np.random.default_rng(0)
    (home / "images").mkdir()
    annotations, instances, questions = [], [], []
    for number in range(NUM_IMAGES):
        name = f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (36, 36, 3), dtype=np.uint8)).save(home / "images" / name)
        answer = f"Picture {number}: a red boat and {number + 2} white houses by a quiet lake."
        turns = [{"from": "human", "value": "<image>\nDescribe this image."}, {"from": "gpt", "value": answer}]
        annotations.append({"id": f"r{number:02d}", "image": name, "conversations": turns})
        instances.append({"id": number, "file_name": name})
        questions.append({"question_id": number, "image": name, "text": "Is there a boat?", "label": "yes"})
    (home / "annotations.json").write_text(json.dumps(annotations))
    categories = [{"id": 1, "name": "boat"}, {"id": 2, "name": "house"}]
    tree = {"images": instances, "annotations": [{"image_id": 0, "category_id": 1}], "categories": categories}
    (home / "instances.json").write_text(json.dumps(tree))
    (home / "pope_random.json").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (home / "my_loss.py").write_text(PLUGIN)
    config = f"""\
model: {{path: base model, dtype: float32}}
data: {{annotations: annotations.json, image_root: images, num_workers: 0}}
bootstrap:
  sources: [text-only, inject]
  batch_size: 4
  weaken: {{max_new_tokens: 8, temperature: 1.0}}
  validate: {{same_language: false, require_real_change: false}}
lora: {{r: 4, alpha: 8, dropout: 0.1}}
loss: {{type: own_sigmoid, plugin: my_loss.py}}
train:
  ds_config: {ROOT}/ds_configs/zero3.json
  epochs: {EPOCHS}
  groups_per_step: {GROUPS_PER_STEP}
  max_micro_batch_tokens: 400
  save_every_steps: 4
  hang_timeout_seconds: 60
  lr: 1.0e-3
  tensorboard: false
evaluation:
  chair_instances: instances.json
  pope_questions: [pope_random.json]
  max_new_tokens: 6
  batch_size: 4
"""
    (home / "run.yaml").write_text(config)
