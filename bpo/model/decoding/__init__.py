"""Decoding of evaluated answers: sampling, beams, contrast with biased views of the image, calibrated labels."""

from bpo.model.decoding.answer import answer_prompts
from bpo.model.decoding.cost import DecodingCost

__all__ = ["DecodingCost", "answer_prompts"]
