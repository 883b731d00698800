"""DeepSpeed: initialise, partition, backward, step. Only this module and checkpoint/ import it."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bpo.config.ds_file import check_results, complete_zero
from bpo.config.training import Config, TrainConfig
from bpo.data.families import Family
from bpo.job import one_process, rendezvous
from bpo.job.collectives import JobRanks
from bpo.job.compile_locks import named_compile_locks
from bpo.job.launch import Ranks, export_torch_environment, pick_device, ranks_from_environment, ranks_per_node
from bpo.job.signals import StopRequest
from bpo.losses.program import HeadOutput, LossProgram
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.levers.lora import borrowed_parameters
from bpo.model.policy import PolicyModel, model_inputs
from bpo.model.trainable import parameter_groups
from bpo.records import GroupBatch, HeadRequest

logger = logging.getLogger(__name__)

# Set by the configuration: a second value in the JSON file would silently override it or be ignored.
_CONFIG_OWNED = {
    "train_batch_size": "train.groups_per_step",
    "train_micro_batch_size_per_gpu": "train.max_micro_batch_tokens",
    "gradient_accumulation_steps": "train.max_micro_batch_tokens",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.lr, train.weight_decay and train.adam_*",
    "scheduler": "train.lr_schedule",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "fp16": "model.dtype",
    "torch_autocast": "model.dtype",
    "data_types": "model.dtype",
    "steps_per_print": "train.log_every_steps",
}

_DEEPSPEED_BUCKET = 500_000_000  # elements; DeepSpeed's default


def find_ds_config(name: str) -> Path:
    """Finds a DeepSpeed file by path, or by name (`ds_configs/zero3.json`) in the installation or clone."""
    path = Path(name)
    if path.is_file():
        return path
    from importlib.resources import as_file, files

    with as_file(files("bpo_ds_configs")) as shipped:
        if (shipped / path.name).is_file():
            return shipped / path.name
        available = ", ".join(sorted(f"ds_configs/{f.name}" for f in shipped.glob("*.json")))
    raise ValueError(f"train.ds_config {name}: no such file; shipped: {available}")


def deepspeed_config(config: TrainConfig, dtype: torch.dtype, accumulation_steps: int) -> dict[str, Any]:
    """Reads the file's ZeRO and offload settings and completes them from the configuration.

    Raises:
        ValueError: the file sets a key that the configuration owns, or is not JSON; it would change the results or does
            not fit the nodes (`config.ds_file`); NVMe without libaio; the dtype is float16.
    """
    if dtype == torch.float16:
        raise ValueError("model.dtype float16 is unsupported in training: log-ratios overflow; use bfloat16 or float32")
    path = find_ds_config(config.ds_config)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    check_results(settings, path, config.lr, config.adam_beta2)
    if settings.get("zero_optimization", {}).get("offload_param", {}).get("device") == "nvme":
        _check_disk_reads(path)
    for key in settings.keys() & _CONFIG_OWNED.keys():
        raise ValueError(f"{path}: `{key}` is set here and by {_CONFIG_OWNED[key]}; remove it here")
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        **complete_zero(settings, path, ranks_from_environment().world_size, ranks_per_node()),
    }


def _check_disk_reads(path: Path) -> None:
    """DeepSpeed itself would only stop while it loads the model."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise ValueError(
            f"{path}: offload_param.device is nvme, which requires libaio; install it (apt-get install libaio-dev), or "
            "name its folders in CFLAGS and LDFLAGS"
        )


def with_fitting_buckets(settings: dict[str, Any], num_gradients: int) -> dict[str, Any]:
    """Caps ZeRO's gradient bucket in `settings` at the size of all gradients.

    DeepSpeed allocates two full buckets in every backward pass regardless of their content: with LoRA, 2 x 2e8 elements
    for the gradients of a few million parameters. One capped bucket still holds all of them.

    Args:
        num_gradients: Elements of all trained parameters, over all ranks.
    """
    zero = settings.get("zero_optimization", {})
    size = zero.get("reduce_bucket_size", _DEEPSPEED_BUCKET)
    if not zero.get("stage") or not isinstance(size, (int, float)) or size <= num_gradients:
        return settings
    return {**settings, "zero_optimization": {**zero, "reduce_bucket_size": num_gradients}}


@named_compile_locks()
def init_distributed(ranks: Ranks, stop: StopRequest | None = None) -> None:
    """Starts the process group: NCCL on GPUs, gloo on CPUs; one process on a CPU opens no port.

    Raises:
        RendezvousError: the ranks do not find each other.
        Interrupted: `stop` was received before all ranks had started.
        StaleCompileLockError: a killed process has left the lock of an operation that DeepSpeed compiles here.
    """
    timeout = rendezvous.collective_timeout()
    import deepspeed

    export_torch_environment(ranks)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(pick_device(ranks))
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    backend = "nccl" if on_gpu else "gloo" if ranks.world_size > 1 else one_process.register()
    store = rendezvous.meet(ranks, timeout, stop)
    with rendezvous.named_wait(ranks):
        torch.distributed.init_process_group(
            backend,
            store=store,
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timeout,
            device_id=pick_device(ranks) if on_gpu and ranks.world_size > 1 else None,  # as DeepSpeed does
        )
    # With it, DeepSpeed maps 64 MB of /dev/shm per rank for its inference, and crashes where there is less.
    local_size = os.environ.pop("LOCAL_SIZE", None)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    if local_size is not None:
        os.environ["LOCAL_SIZE"] = local_size


@contextlib.contextmanager
def partitioned_loading(settings: dict[str, Any]) -> Iterator[None]:
    """Under ZeRO-3, makes `from_pretrained` partition each weight as it is read; no rank holds the whole model."""
    if settings.get("zero_optimization", {}).get("stage") != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    handle = HfDeepSpeedConfig(settings)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del handle


def learning_rate_factor(step: int, total_steps: int, config: TrainConfig) -> float:
    """Fraction of the peak learning rate at a step (from 0): linear warm-up, then cosine or linear decay, or constant.

    Never 0, because such a step would not change the weights.
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if config.lr_schedule == "linear" else 1.0


class TrainingEngine:
    """Wraps policy, optimizer and ZeRO in four calls: `forward`, `backward`, `step`, `reference_logp`.

    Args:
        program: The loss; None makes it from the configuration.

    Raises:
        StaleCompileLockError: a killed process has left the lock of an operation that DeepSpeed compiles here.
    """

    @named_compile_locks()
    def __init__(
        self,
        policy: PolicyModel,
        family: Family,
        config: Config,
        settings: dict[str, Any],
        ranks: Ranks,
        program: LossProgram | None = None,
    ):
        import deepspeed

        self.program = program or LossProgram(config.loss, config.train.seed)

        groups = parameter_groups(policy.model, family, config)
        self.base_lrs = [group["lr"] for group in groups]
        gradients = sum(getattr(p, "ds_numel", p.numel()) for group in groups for p in group["params"])
        self.settings = with_fitting_buckets(settings, gradients)
        self.ranks = ranks
        self.device = pick_device(ranks)
        self.dtype: torch.dtype = policy.model.dtype
        self.on_forward: Callable[[], None] = lambda: None  # heartbeat hook, called once per micro-batch
        # Gives micro-batches the features of their images; see `bpo.training.features`.
        self.prepare_images: Callable[[Iterable[GroupBatch]], Iterator[GroupBatch]] = iter
        # Other weights that checkpoints contain, by name; each list is like `master_weights`.
        self.copies: dict[str, list[torch.Tensor]] = {}
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=policy,
            optimizer=self._optimizer(groups, config.train),
            config=self.settings,
            dist_init_required=False,
        )
        if self.is_partitioned:
            for module, parameter in borrowed_parameters(policy):
                deepspeed.zero.register_external_parameter(module, parameter)

    def _optimizer(self, groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
        betas = (config.adam_beta1, config.adam_beta2)
        offload = self.settings.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
        if offload != "none":
            from deepspeed.ops.adam import DeepSpeedCPUAdam  # vectorised for the host, where the states are

            return DeepSpeedCPUAdam(groups, lr=config.lr, betas=betas, eps=config.adam_eps, adamw_mode=True)
        fused = self.device.type == "cuda"
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps, fused=fused)

    @property
    def policy(self) -> PolicyModel:
        return self.deepspeed.module

    def forward(self, batch: GroupBatch, reference_ND: torch.Tensor | None = None) -> HeadOutput:
        """The head's results for a batch on this device: log-probs, and losses of the terms that the kernels compute.

        Call it, and backward, inside `packed_layout(batch.layout)`.

        Args:
            reference_ND: `hidden_states` of the reference, for a loss that extrapolates from it.
        """
        request = self.program.request(batch.loss_inputs)
        head = self._call(batch, loss_inputs=batch.loss_inputs, request=request, reference_ND=reference_ND)
        return HeadOutput(*head)

    def _call(self, batch: GroupBatch, **options: Any) -> Any:
        if batch.image_keys and not batch.features:
            (batch,) = self.prepare_images([batch])
        self.on_forward()
        return self.deepspeed(**model_inputs(batch), **options)

    def encode_images(self, entries: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Features of images from the frozen vision tower; see `FrozenTower.encode`. On all ranks under ZeRO-3."""
        self._forget_order_of_layers()
        self.on_forward()
        return self.policy.tower.encode(entries)

    def reference_logp(self, batch: GroupBatch) -> HeadOutput:
        """fp32 log-probs and second targets, without dropout or gradient. Before the first step the policy *is* the
        reference.
        """
        return HeadOutput(*self._evaluate(batch, loss_inputs=batch.loss_inputs, request=HeadRequest()))

    def evaluate(self, batch: GroupBatch, reference_ND: torch.Tensor | None = None) -> HeadOutput:
        """`forward` without dropout or gradient; needs no `packed_layout`."""
        request = self.program.request(batch.loss_inputs)
        head = self._evaluate(batch, loss_inputs=batch.loss_inputs, request=request, reference_ND=reference_ND)
        return HeadOutput(*head)

    def hidden_states(self, batch: GroupBatch) -> torch.Tensor:
        """Hidden states [N, D] of the rows that reach the LM head, without dropout or gradient."""
        hidden_ND: torch.Tensor = self._evaluate(batch, hidden_only=True)
        return hidden_ND

    @torch.no_grad()
    def _evaluate(self, batch: GroupBatch, **options: Any) -> Any:
        self.deepspeed.eval()
        with packed_layout(batch.layout):
            result = self._call(batch, **options)
        self.deepspeed.train()
        return result

    @property
    def is_partitioned(self) -> bool:
        """Whether no rank has the whole model (ZeRO-3): all ranks must run the same forward passes."""
        return self.settings.get("zero_optimization", {}).get("stage") == 3

    @contextlib.contextmanager
    def generating(self) -> Iterator[Any]:
        """The model in eval mode, for `generate`; with the adapter unmerged, as it trains.

        Under ZeRO-3 the weights of each layer are gathered for each token, and transformers keeps ranks that have
        finished their batch running until all have.
        """
        self._forget_order_of_layers()
        self.policy.forget_batch()
        heartbeat = self.policy.model.register_forward_pre_hook(lambda *_: self.on_forward())
        self.deepspeed.eval()
        try:
            with partitioned_loading(self.settings):  # tells transformers of ZeRO-3
                yield self.policy.model
        finally:
            heartbeat.remove()
            self.deepspeed.train()

    def _forget_order_of_layers(self) -> None:
        """Under ZeRO-3, before layers run outside of a whole pass, whose order DeepSpeed records for prefetching."""
        if self.is_partitioned:
            layers = self.optimizer.parameter_offload.get_param_coordinator()
            if not layers.is_invalid_trace():
                layers._invalidate_trace()

    @property
    def master_weights(self) -> list[torch.Tensor]:
        """This rank's part of the trained parameters as flat fp32 tensors, which the optimizer changes in place.

        Raises:
            ValueError: DeepSpeed's optimizer is not that of ZeRO 1, 2 or 3.
        """
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):  # of ZeRO-3; of ZeRO 1 and 2
            if hasattr(self.optimizer, name):
                return list(getattr(self.optimizer, name))
        raise ValueError(f"DeepSpeed's {type(self.optimizer).__name__} has no master weights; use ZeRO 1, 2 or 3")

    @torch.no_grad()
    def publish_master_weights(self) -> None:
        """Sets the model's weights to the master weights, as a step does. Call on all ranks."""
        zero = self.optimizer
        if not hasattr(zero, "fp32_partitioned_groups_flat"):
            zero.update_lp_params()
            return
        zero.checkpoint_event_prologue()
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
            if flat.numel():
                zero._reassign_or_swap_out_partitioned_parameters(number)
        zero.checkpoint_event_epilogue()

    def backward(self, loss: torch.Tensor, *, is_last: bool, after_forward: bool = True) -> None:
        """Accumulates the gradient of `loss`, this rank's share of a sum over all ranks.

        Args:
            is_last: Whether it is the step's last.
            after_forward: Whether its forward pass was the last thing run, rather than another backward pass.

        DeepSpeed divides by the number of ranks and, by default, by its accumulation steps. Both are undone, so the
        gradient is exactly that of the sum of all shares, regardless of how the step was divided.
        """
        if not after_forward:
            # ZeRO-3 adds to the gradients of the backward pass before instead of replacing them only once this ran,
            # which DeepSpeed does at each forward pass.
            self.optimizer.clear_backward_seen_flag()
        self.deepspeed.set_gradient_accumulation_boundary(is_last)
        self.deepspeed.backward(loss * self.ranks.world_size, scale_wrt_gas=False)

    def step(self, lr_factor: float) -> torch.Tensor:
        """Optimizer step at `lr_factor` times the peak learning rates; returns the gradient norm before clipping.

        The norm is a scalar that may still be on the device; see `read_step`.
        """
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base_lr * lr_factor
        self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm()
        return torch.as_tensor(float("nan") if norm is None else norm)

    def read_step(self, own_S: torch.Tensor, norm: torch.Tensor) -> tuple[list[float], float]:
        """Sums over all ranks of [S] numbers in fp64, and a step's gradient norm: read from the device together."""
        total_S = own_S.to(self.device, non_blocking=True)
        torch.distributed.all_reduce(total_S)
        *totals, norm_value = torch.cat([total_S, norm.to(total_S, non_blocking=True).view(1)]).tolist()
        return totals, norm_value

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Sums numbers over all ranks, in fp64."""
        return JobRanks(self.ranks).sum(values)
