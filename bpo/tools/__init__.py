"""Commands other than training: demo, view, plan, bench, doctor, score, refs. Imported by cli, benchmarks and tests."""
