"""Bootstrapped Preference Optimization (arXiv 2403.08730) for multimodal LLMs.

Importing the package loads neither torch nor deepspeed nor triton; import the module you need, for example
``from bpo.losses import ...``.
"""

__version__ = "0.1.0"
