"""Data-sheet figures of accelerators, for `bpo plan` and as the peak in MFU.

GB are 10^9 bytes; GB/s are per direction. Peaks are dense bf16 products with fp32 accumulation: rates that a data sheet
quotes with sparsity are halved.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """Data-sheet figures of one GPU.

    Attributes:
        name: Value of `--gpu`.
        device_names: Substrings of `torch.cuda.get_device_name()`, all required.
        peak_tflops: Dense bf16 TFLOP/s.
        memory_gb: Memory in GB.
        memory_gb_s: Memory bandwidth.
        link_gb_s: Bandwidth to a node's other GPUs, per direction: NVLink, or PCIe without it.
        host_gb_s: Bandwidth to the host, per direction: PCIe x16.
    """

    name: str
    device_names: tuple[str, ...]
    peak_tflops: float
    memory_gb: float
    memory_gb_s: float
    link_gb_s: float
    host_gb_s: float


# Source of each line: NVIDIA's data sheet of the product; PCIe x16 is 32 GB/s in generation 4 and 64 GB/s in 5.
ACCELERATORS = (
    Accelerator("a100-40gb", ("A100", "40GB"), 312.0, 40, 1555, 300, 32),  # A100 data sheet, SXM4
    Accelerator("a100-80gb", ("A100",), 312.0, 80, 2039, 300, 32),  # A100 data sheet, SXM4
    Accelerator("h100-pcie", ("H100", "PCIe"), 756.5, 80, 2000, 64, 64),  # H100 data sheet, PCIe
    Accelerator("h100", ("H100",), 989.4, 80, 3350, 450, 64),  # H100 data sheet, SXM5
    Accelerator("h200", ("H200",), 989.4, 141, 4800, 450, 64),  # H200 data sheet, SXM5
    Accelerator("b200", ("B200",), 2250.0, 180, 8000, 900, 64),  # DGX B200 data sheet, an eighth of the system
    Accelerator("l40s", ("L40S",), 362.05, 48, 864, 32, 32),  # L40S data sheet
    Accelerator("rtx4090", ("RTX 4090",), 165.2, 24, 1008, 32, 32),  # Ada architecture paper, fp32 accumulation
)


def accelerator(name: str) -> Accelerator:
    """Returns the accelerator that `--gpu` names.

    Raises:
        ValueError: the name is unknown; lists the known ones.
    """
    for gpu in ACCELERATORS:
        if gpu.name == name.lower():
            return gpu
    raise ValueError(f"--gpu {name}: unknown; available: {', '.join(gpu.name for gpu in ACCELERATORS)}")


def accelerator_of_device(device_name: str) -> Accelerator | None:
    """The first accelerator that matches a CUDA device name; None if none does."""
    return next((gpu for gpu in ACCELERATORS if all(part in device_name for part in gpu.device_names)), None)


def peak_flops(device_name: str, peak_tflops: float = 0.0) -> float | None:
    """FLOP/s of one device: `peak_tflops` if given, else by name; None for an unknown device."""
    if peak_tflops:
        return peak_tflops * 1e12
    found = accelerator_of_device(device_name)
    return None if found is None else found.peak_tflops * 1e12
