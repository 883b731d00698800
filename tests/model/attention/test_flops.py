"""FLOPs of packed attention as counted by `FlopCounterMode`, per backend.

Shape letters: N response tokens.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bpo.config.training import ModelConfig
from bpo.data.families import family_of
from bpo.model import load
from bpo.model.attention.choice import BackendName, Choice
from bpo.model.attention.flops import _pairs, register_flop_formulas, sequence_pairs
from bpo.model.attention.shared_prefix import packed_layout, shared_prefix_attention
from bpo.model.policy import PolicyModel, model_inputs
from bpo.records import PackedLayout
from bpo.tools.bench.meter import Meter
from bpo.training.flops import model_flops
from tests.attention_backends import BACKENDS, LAYOUTS, VARLEN, num_tokens, random_qkv, run_without_gpu
from tests.pairwise import pairwise
from tests.sample_groups import encoder_of, packed_batch, three_groups

CPU = torch.device("cpu")
COMPILED = (*VARLEN, "flex")
# A prefix with its first completion as a square, each further completion with its prefix's keys and its own.
PAIRS = {"one completion": 7 * 7, "three unequal groups": 8**2 + 1 * 6 + 3 * 8 + 3**2 + 4 * 5 + 10**2 + 1 * 10}

# A prefix's square and all completions of a group against all its rows, of the three unequal groups.
SDPA_PAIRS = 5**2 + 7 * 12 + 1 + 6 * 7 + 9**2 + 2 * 11


@pytest.fixture(autouse=True)
def _without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    run_without_gpu(monkeypatch)
    register_flop_formulas()


def counted(layout: PackedLayout, backend: BackendName, key_heads: int, backward: bool) -> int:
    qkv = random_qkv(num_tokens(layout), key_heads=key_heads, head_size=16)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        output = shared_prefix_attention(*qkv, layout, backend=backend)
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(*pairwise(backend=COMPILED, name=list(PAIRS), key_heads=[4, 2]))
def test_backends_count_the_same_by_formula(backend: BackendName, name: str, key_heads: int) -> None:
    """Two products of 2 x 16 FLOPs per pair and query head in the forward pass, five more in the backward pass."""
    of_product = PAIRS[name] * 4 * 2 * 16
    assert counted(LAYOUTS[name], backend, key_heads, backward=False) == 2 * of_product
    assert counted(LAYOUTS[name], backend, key_heads, backward=True) == 7 * of_product


def test_sdpa_counts_its_two_calls() -> None:
    """As plain products, four in the backward pass, because the scores are saved."""
    with sdpa_kernel(SDPBackend.MATH):
        assert counted(LAYOUTS["three unequal groups"], "sdpa", 4, backward=False) == 2 * SDPA_PAIRS * 4 * 2 * 16
        assert counted(LAYOUTS["three unequal groups"], "sdpa", 4, backward=True) == 6 * SDPA_PAIRS * 4 * 2 * 16


def test_pytorchs_own_formula_of_varlen_attn_says_the_same() -> None:
    """PyTorch counts `varlen_attn` itself in later versions; the count must then stay the same."""
    from torch.utils import flop_counter

    if not hasattr(flop_counter, "_varlen_attn_forward_flop"):
        pytest.skip(f"PyTorch {torch.__version__} has no formula for varlen_attn")
    assert flop_counter.flop_registry[torch.ops.torch_attn._varlen_attn] is flop_counter._varlen_attn_forward_flop


@pytest.mark.parametrize("grouped", [False, True])
def test_sdpa_kernels_of_gpus_count_grouped_heads(grouped: bool) -> None:
    """PyTorch 2.11 raises an AssertionError if there are fewer key heads than query heads."""
    from torch.utils.flop_counter import flop_registry

    key_heads = 2 if grouped else 4
    query, key = torch.empty(1, 4, 3, 16), torch.empty(1, key_heads, 7, 16)
    for kernel in ("flash", "efficient", "cudnn"):
        forward = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention")
        backward = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention_backward")
        assert flop_registry[forward](query, key, key, out_val=None) == 2 * (3 * 7 * 4 * 2 * 16)
        assert flop_registry[backward](query, query, key, key, out_val=None) == 5 * (3 * 7 * 4 * 2 * 16)


def test_dense_batches_count_each_query_head_with_all_keys() -> None:
    """The towers' calls: tokens before heads in flash-attn, after them in SDPA; key heads are shared."""
    assert _pairs(torch.empty(2, 3, 4, 16), torch.empty(2, 7, 2, 16), None, None, -3) == 2 * 4 * 3 * 7
    assert _pairs(torch.empty(2, 4, 3, 16), torch.empty(2, 2, 7, 16), None, None, -2) == 2 * 4 * 3 * 7


def test_the_meter_of_bpo_bench_counts_sdpa_with_grouped_heads() -> None:
    """On a CPU, for which PyTorch has no formula, by the same convention: each call's queries with all its keys."""
    model = torch.nn.ModuleDict({"language": torch.nn.Identity(), "vision": torch.nn.Identity()})
    qkv = random_qkv(num_tokens(LAYOUTS["three unequal groups"]), key_heads=2, head_size=16, dtype=torch.float32)
    result: dict[str, int] = {}
    with Meter(model, "language", "vision", CPU).measure("flops", result):
        shared_prefix_attention(*qkv, LAYOUTS["three unequal groups"]).sum().backward()
    assert result["flops"] == 7 * SDPA_PAIRS * 4 * 2 * 16


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_counts_what_it_needs(
    backend: BackendName, checkpointing: str, tiny_llava_dir: Path, photo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `bpo bench step` asks: at least 99 % of the step's FLOPs by `bpo.training.flops`."""
    torch._dynamo.reset()
    monkeypatch.setattr(load, "choose_backend", lambda wanted, needs: Choice(backend, "tested"))
    config = ModelConfig(path=str(tiny_llava_dir), dtype="float32", gradient_checkpointing=checkpointing)
    policy = PolicyModel(load.load_model(config, for_training=True)).train()
    batch = packed_batch(encoder_of(tiny_llava_dir, photo_root), three_groups())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), packed_layout(batch.layout):
        policy(**model_inputs(batch.to(CPU, torch.float32))).sum().backward()
    useful = model_flops(policy.model, family_of(policy.model.config)).step(batch.useful_work)
    assert counter.get_total_flops() >= 0.99 * useful
    by_operator = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    attention = {
        name: flops for name, flops in by_operator.items() if name.startswith(("flash_attn", "torch_attn", "bpo"))
    }
    # Saved results are not recomputed; compiled code and whole layers are.
    products = 7 if checkpointing == "none" or (checkpointing == "selective" and backend != "flex") else 9
    text = policy.model.config.text_config
    of_product = 2 * sequence_pairs(batch.layout) * text.hidden_size * text.num_hidden_layers
    assert sum(attention.values()) == (0 if backend == "sdpa" else products * of_product)
