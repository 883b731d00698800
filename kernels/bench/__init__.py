"""The kernel benchmark: cases, providers, measurement, ahead-of-time compilation, the command."""
