"""Commands around training: demo, view, plan, bench, doctor, score, refs. Only cli, benchmarks/, tests import them."""
