"""Linear layers with LoRA on Triton: host side of `lora_kernels.py`, with the signature of `plain_lora`."""
