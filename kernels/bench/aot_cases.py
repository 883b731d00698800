"""The launches that aot.py compiles: every kernel with the types and constants passed by the host wrappers.

Pointers and sizes are declared as multiples of 16, as for LLaVA's vocabulary of 32,064 tokens, and once more without,
as for a vocabulary of 31.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from .. import fused_logprob, logprob_gather, logprob_rows, lora, preference_loss, second_target
from ..checks import IGNORED_TARGET

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# CUDA compute capabilities, and AMD's names.
NVIDIA: tuple[int | str, ...] = (80, 90, 100)
AMD: tuple[int | str, ...] = ("gfx942",)
ARCHITECTURES = (*NVIDIA, *AMD)


@dataclass(frozen=True)
class Case:
    """A kernel with the argument types and constants of one launch, for the targets `archs` (None: all)."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    aligned: bool = True
    num_stages: int | None = None
    archs: tuple[int | str, ...] | None = None
    max_registers: int = 128


def _logprob_gather_cases() -> list[Case]:
    cases = []
    for logits in ("bf16", "fp16", "fp32"):
        for vocab, aligned in ((32064, True), (31, False)):
            constants = {"IGNORED": IGNORED_TARGET, "stride_v": 1, "BLOCK_V": logprob_gather.block_v(vocab)}
            rows = {"target_ptr": "*i64", "max_ptr": "*fp32", "log_sum_ptr": "*fp32", "V": "i32", "stride_n": "i32"}
            forward = rows | {"logits_ptr": f"*{logits}", "logp_ptr": "*fp32"}
            backward = rows | {
                "logits_ptr": f"*{logits}",
                "grad_logits_ptr": f"*{logits}",
                "grad_logp_ptr": "*fp32",
            }
            label, warps = f"{logits} V={vocab}", logprob_gather.NUM_WARPS
            for direction, kernel, signature in (
                ("fwd", logprob_gather.logprob_gather_fwd_kernel, forward),
                ("bwd", logprob_gather.logprob_gather_bwd_kernel, backward),
            ):
                name, given = f"logprob_gather_{direction} {label}", constants
                if direction == "bwd":
                    given, signature = constants | {"grad_stride_v": 1}, signature | {"grad_stride_n": "i32"}
                cases.append(Case(name, kernel, signature, given, warps, aligned))
    return cases


_ROW_POINTERS = {"logits_ptr": "*fp32", "target_ptr": "*i64", "logp_ptr": "*fp32"}


def _row_case(dtype: str, vocab: int, with_dlogits: bool) -> Case:
    config = logprob_rows.row_config(vocab, DTYPES[dtype], plain=True, amd=False)
    signature = _ROW_POINTERS | {"V": "i32", "scale": "fp32"}
    constants: dict[str, Any] = {"IGNORED": IGNORED_TARGET, "WITH_DLOGITS": with_dlogits}
    constants |= {"BLOCK_V": config.BLOCK_V, "REST_V": config.REST_V}
    _add_optional(signature, constants, {"dlogits_ptr": f"*{dtype}" if with_dlogits else None})
    label = f"logprob_row {dtype} V={vocab}" + " +D" * with_dlogits
    launch = (signature, constants, config.num_warps, vocab % 16 == 0, None, NVIDIA)
    return Case(label, logprob_rows.logprob_row_kernel, *launch)


def _streamed_case(
    dtype: str, vocab: int, with_dlogits: bool, capped: bool, statistics: bool, archs: tuple[int | str, ...]
) -> Case:
    plain = not (capped or statistics)
    config = logprob_rows.row_config(vocab, DTYPES[dtype], plain=plain, amd=archs != NVIDIA)
    signature = _ROW_POINTERS | {"N": "i32", "V": "i32", "softcap": "fp32", "scale": "fp32"}
    constants = {
        "IGNORED": IGNORED_TARGET,
        "HAS_BIAS": capped,
        "HAS_SOFTCAP": capped,
        "WITH_STATISTICS": statistics,
        "WITH_DLOGITS": with_dlogits,
        "BLOCK_V": config.BLOCK_V,
    }
    optional = {
        "dlogits_ptr": f"*{dtype}" if with_dlogits else None,
        "bias_ptr": f"*{dtype}" if capped else None,
        "entropy_ptr": "*fp32" if statistics else None,
        "argmax_ptr": "*i64" if statistics else None,
        "collision_ptr": "*fp32" if statistics else None,
    }
    _add_optional(signature, constants, optional)
    options = (with_dlogits, " +D"), (capped, " +bias+cap"), (statistics, " +statistics")
    label = f"logprob_rows {dtype} V={vocab}" + "".join(text for asked, text in options if asked)
    launch = (signature, constants, config.num_warps, vocab % 16 == 0, None, archs)
    return Case(label, logprob_rows.logprob_rows_kernel, *launch)


def _logprob_rows_cases() -> list[Case]:
    """Rows in registers for LLaVA's and SmolLM's vocabularies; streamed for Qwen's, heads with options, and AMD."""
    whole = [("bf16", 32064), ("bf16", 49152), ("bf16", 31), ("fp16", 49152), ("fp32", 32064)]
    cases = [_row_case(dtype, vocab, with_dlogits) for dtype, vocab in whole for with_dlogits in (True, False)]
    # dtype, vocabulary, with D, bias and cap, statistics
    streamed = [
        ("bf16", 152064, True, False, False),
        ("bf16", 152064, False, False, False),
        ("bf16", 152064, True, True, True),
        ("bf16", 31, True, True, True),
        ("fp32", 152064, True, False, False),
    ]
    return cases + [_streamed_case(*wanted, archs) for archs in (NVIDIA, AMD) for wanted in streamed]


def _preference_loss_cases() -> list[Case]:
    """Completions with the pieces of 4 Mi tokens; losses of few pairs, which sum tokens directly, and of many."""
    sizes = preference_loss.sizes
    tiles = {"PIECE": sizes.piece_tokens(4 << 20), "COLUMNS": sizes.COLUMNS}
    batch = {"completion_ptr": "*i64", "starts_ptr": "*i64", "K": "i32"}
    pairs = {"pairs_ptr": "*i64", "starts_ptr": "*i64", "K": "i32", "P": "i32", "beta": "fp32", "slope": "fp32"}
    pairs |= dict.fromkeys(("loss_ptr", "chosen_ptr", "rejected_ptr", "derivative_ptr"), "*fp32")
    grads = {"grad_loss_ptr": "*fp32", "grad_stride": "i32", "derivative_ptr": "*fp32", "K": "i32", "P": "i32"}
    units = {"units_ptr": "*i64", "peaks_ptr": "*fp32"}
    cases = []

    def add(name: str, signature: dict[str, str], constants: dict[str, Any], optional: dict[str, str | None]) -> None:
        signature, constants = dict(signature), dict(constants)
        _add_optional(signature, constants, optional)
        kernel = getattr(preference_loss.kernels, f"{name.split()[0]}_kernel")
        cases.append(Case(name, kernel, signature, constants, sizes.NUM_WARPS))

    losses = [(loss_type, _own_factors(given)) for given in (False, True) for loss_type in ("sigmoid", "hinge", "ipo")]
    constants: dict[str, Any]
    for has_weight in (True, False):
        weight, label = {"weight_ptr": "*fp32" if has_weight else None}, " +weight" * has_weight
        tokens = dict.fromkeys(("policy_ptr", "reference_ptr"), "*fp32")
        weighted = {"HAS_WEIGHT": has_weight}
        constants = weighted | tiles | {"ROWS": sizes.SUM_ROWS}
        add(f"preference_loss_sums{label}", batch | tokens | {"sums_ptr": "*fp32"}, constants, weight)
        for loss_type, own in losses:
            constants = weighted | own[1] | {"LOSS_TYPE": loss_type, "BLOCK_N": sizes.BLOCK_N}
            add(f"preference_loss_direct {loss_type}{own[0]}{label}", pairs | tokens, constants, weight | own[2])
        for direct in (True, False):
            signature = batch | grads | {"bits": "i32", "grad_policy_ptr": "*fp32"}
            constants = weighted | tiles | {"ROWS": sizes.GRAD_ROWS, "DIRECT": direct}
            constants["BLOCK_P"] = sizes.DIRECT_PAIRS
            which = {"pairs_ptr": "*i64", "peak_ptr": None, "units_ptr": None}
            if not direct:
                which = {"pairs_ptr": "*i64", "peak_ptr": "*fp32", "units_ptr": "*i64"}
            add(f"preference_loss_bwd{' direct' * direct}{label}", signature, constants, which | weight)
    for loss_type, own in losses:
        constants = {"PIECE": tiles["PIECE"], "ROWS": sizes.PAIR_ROWS, "COLUMNS": sizes.PAIR_COLUMNS}
        constants |= own[1] | {"LOSS_TYPE": loss_type}
        add(f"preference_loss_pairs {loss_type}{own[0]}", pairs | {"sums_ptr": "*fp32"}, constants, own[2])
    peak = grads | units | {"num_programs": "i32"}
    add("preference_loss_peak", peak, {"BLOCK": sizes.PEAK_BLOCK}, {})
    scatter = grads | units | {"pairs_ptr": "*i64", "num_peaks": "i32", "bits": "i32"}
    add("preference_loss_scatter", scatter, {"BLOCK_P": sizes.BLOCK_P, "MAX_PEAKS": sizes.MAX_PEAKS}, {})
    return cases


def _own_factors(given: bool) -> tuple[str, dict[str, bool], dict[str, str | None]]:
    """Label, constants and pointers of pairs with or without their own beta and weight."""
    constants = dict.fromkeys(("HAS_PAIR_BETA", "HAS_PAIR_WEIGHT"), given)
    pointer = "*fp32" if given else None
    pointers: dict[str, str | None] = dict.fromkeys(("pair_beta_ptr", "pair_weight_ptr"), pointer)
    return " +pair beta+weight" * given, constants, pointers


def _second_target_cases() -> list[Case]:
    """Heads with bias and cap and without; backward of a frozen head, and of one whose hidden states are constant."""
    blocks: dict[str, Any] = {"IGNORED": IGNORED_TARGET}
    blocks |= {"BLOCK_N": second_target.BLOCK_N, "BLOCK_H": second_target.BLOCK_H}
    rows = {"target_ptr": "*i64", "second_ptr": "*i64", "slopes_ptr": "*fp32", "N": "i32", "V": "i32", "H": "i32"}
    cases = []
    for dtype, capped, aligned in (
        ("bf16", False, True),
        ("bf16", True, True),
        ("fp32", True, True),
        ("bf16", True, False),
    ):
        signature = rows | {"weight_ptr": f"*{dtype}"}
        label = f"{dtype}{' +bias+cap' * capped}{' H=33' * (not aligned)}"
        launch = (second_target.NUM_WARPS, aligned)
        forward = signature | {"hidden_ptr": f"*{dtype}", "logp_ptr": "*fp32", "result_ptr": "*fp32"}
        forward |= {"softcap": "fp32", "scale": "fp32"}
        constants = blocks | {"HAS_BIAS": capped, "HAS_SOFTCAP": capped}
        _add_optional(forward, constants, {"bias_ptr": f"*{dtype}" if capped else None})
        kernel = second_target.second_target_fwd_kernel
        cases.append(Case(f"second_target_fwd {label}", kernel, forward, constants, *launch))
        if capped and aligned and dtype == "bf16":
            continue  # the backward has no bias and no cap
        for needs_hidden in (True, False):
            backward = signature | {"grad_ptr": "*fp32", "grad_stride": "i32", "grad_logp_ptr": "*fp32"}
            constants = blocks | {"NEEDS_HIDDEN": needs_hidden}
            _add_optional(backward, constants, {"grad_hidden_ptr": f"*{dtype}" if needs_hidden else None})
            name = f"second_target_bwd {label.replace(' +bias+cap', '')}" + " +hidden" * needs_hidden
            cases.append(Case(name, second_target.second_target_bwd_kernel, backward, constants, *launch))
    return cases


def _lora_cases() -> list[Case]:
    """A group of three with biases, as q, k and v have them, single layers, and the kernels with a mask."""
    cases = []
    for arch in ARCHITECTURES:
        for dtype, members, width in (("bf16", 3, 32), ("bf16", 1, 64), ("fp32", 3, 32)):
            tiles = lora.fused_config(DTYPES[dtype], arch)
            sizes = ("T", "D", "R", "O_0", "O_1", "O_2", "r_0", "r_1", "r_2", "end_0", "end_1")
            signature = dict.fromkeys(sizes, "i32") | dict.fromkeys(("x_ptr", "h_ptr"), f"*{dtype}")
            constants = {"MEMBERS": members, "UPCAST": False, "GROUP_T": lora.GROUP_T, "BLOCK_R": width}
            names = [(name, position) for name in ("weight", "b", "y", "bias") for position in range(3)]
            present = {f"{n}_{i}_ptr": i < members and (n != "bias" or members > 1) for n, i in names}
            _add_optional(signature, constants, {n: f"*{dtype}" if given else None for n, given in present.items()})
            label = f"lora_fused {dtype} {members} members, rank {width}"
            cases.append(_lora_case(label, lora.lora_fused_kernel, signature, constants, tiles, (arch,)))
    for dtype, slots, rows in (("bf16", 96, 8192), ("bf16", 96, 2048), ("fp32", 96, 2048)):
        masked = {"seed_ptr": "*i64"} | dict.fromkeys(("T", "D", "Q", "R", "mask_stream", "threshold"), "i32")
        down = masked | dict.fromkeys(("x_ptr", "a_ptr", "h_ptr"), f"*{dtype}") | {"end_0": "i32", "end_1": "i32"}
        down |= dict.fromkeys(("scale_0", "scale_1", "scale_2"), "fp32")
        config = lora.down_config(DTYPES[dtype], rows, slots)
        cases.append(_lora_case(f"lora_down {dtype} T={rows}", lora.lora_down_kernel, down, {}, config, None))
        if rows == 2048:
            grad_x = masked | dict.fromkeys(("grad_x_ptr", "grad_h_ptr", "a_ptr"), f"*{dtype}")
            config = lora.grad_x_config(DTYPES[dtype], 32)
            cases.append(_lora_case(f"lora_grad_x {dtype}", lora.lora_grad_x_kernel, grad_x, {}, config, None))
            grad_a = masked | {"x_ptr": f"*{dtype}", "grad_h_ptr": f"*{dtype}", "partial_ptr": "*fp32"}
            grad_a["rows_per_part"] = "i32"
            config = lora.grad_a_config(DTYPES[dtype], slots)
            cases.append(_lora_case(f"lora_grad_a {dtype}", lora.lora_grad_a_kernel, grad_a, {}, config, NVIDIA))
    return cases


def _lora_case(name: str, kernel: Any, signature: Any, constants: Any, config: Any, archs: Any) -> Case:
    blocks = {key: value for key, value in asdict(config).items() if key.startswith("BLOCK")}
    constants = {"UPCAST": False} | constants | blocks
    return Case(name, kernel, signature, constants, config.num_warps, True, config.num_stages, archs, 255)


def _fused_logprob_cases() -> list[Case]:
    """Tiles of each architecture: many and few rows, bulk copies and single addresses, all outputs and none."""
    cases = []
    # (bias and cap, statistics, single addresses)
    full, bare, counted, unaligned = (
        (True, True, False),
        (False, False, False),
        (False, True, False),
        (True, True, True),
    )
    wanted = [("bf16", n, o) for n in (2048, 64) for o in (full, bare, counted, unaligned)]
    wanted += [("fp16", 2048, bare), ("fp32", 2048, full), ("fp32", 2048, bare)]
    for arch in ARCHITECTURES:
        for dtype, num_rows, (capped, statistics, addresses) in wanted:
            descriptors = not addresses
            config = fused_logprob.gemm_config(DTYPES[dtype], num_rows, arch, descriptors=descriptors, capped=capped)
            pointers = {"hidden_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "target_ptr": "*i64"}
            signature: dict[str, Any] = pointers | dict.fromkeys(("max_ptr", "sum_ptr", "target_logit_ptr"), "*fp32")
            signature |= {"N": "i32", "V": "i32", "H": "i32", "softcap": "fp32", "scale": "fp32"}
            constants: dict[str, Any] = {
                "HAS_BIAS": capped,
                "HAS_SOFTCAP": capped,
                "WITH_STATISTICS": statistics,
                "USE_DESCRIPTORS": descriptors,
                "UPCAST": False,
                "GROUP_N": fused_logprob.GROUP_N,
                "BLOCK_N": config.BLOCK_N,
                "BLOCK_V": config.BLOCK_V,
                "BLOCK_H": config.BLOCK_H,
            }
            types = {"bias_ptr": f"*{dtype}" if capped else None}
            partials = {"moment_ptr": "*fp32", "square_ptr": "*fp32", "argmax_ptr": "*i32"}
            types |= {name: given if statistics else None for name, given in partials.items()}
            _add_optional(signature, constants, types)
            tiles = f"{config.BLOCK_N}x{config.BLOCK_V}x{config.BLOCK_H}"
            label = f"fused_logprob {dtype} N={num_rows} {tiles}"
            label += " +bias+cap" * capped + " +statistics" * statistics + " H=33" * addresses
            launch = (signature, constants, config.num_warps, descriptors, config.num_stages, (arch,), 255)
            cases.append(Case(label, fused_logprob.fused_logprob_kernel, *launch))
    for statistics in (True, False):
        signature = dict.fromkeys(("max_ptr", "sum_ptr", "target_logit_ptr", "logp_ptr"), "*fp32")
        signature |= {"target_ptr": "*i64", "N": "i32", "V": "i32", "T": "i32"}
        blocks = {"BLOCK_N": fused_logprob.JOIN_BLOCK_N, "BLOCK_T": fused_logprob.JOIN_BLOCK_T}
        constants = {"IGNORED": IGNORED_TARGET, "WITH_STATISTICS": statistics} | blocks
        types = dict.fromkeys(("moment_ptr", "square_ptr", "entropy_ptr", "collision_ptr"), "*fp32")
        types |= {"argmax_ptr": "*i32", "highest_ptr": "*i64"}
        _add_optional(signature, constants, {k: v if statistics else None for k, v in types.items()})
        label = "join_tiles" + " +statistics" * statistics
        cases.append(Case(label, fused_logprob.join_tiles_kernel, signature, constants, fused_logprob.JOIN_WARPS))
    return cases


def _add_optional(signature: dict[str, Any], constants: dict[str, Any], types: dict[str, str | None]) -> None:
    """Adds optional pointers: those without a type become the constant None."""
    for name, given in types.items():
        if given is None:
            constants[name] = None
        else:
            signature[name] = given


def all_cases() -> list[Case]:
    """All kernels in all configurations that the host wrappers launch."""
    heads = _logprob_gather_cases() + _logprob_rows_cases() + _fused_logprob_cases() + _second_target_cases()
    return heads + _preference_loss_cases() + _lora_cases()
