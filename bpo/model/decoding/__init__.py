"""Decoding of evaluated answers: sampling, beams, contrast with biased views of the image, calibrated labels."""
