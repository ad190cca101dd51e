"""Benchmarks, each one command: `python -m benchmarks.<name>`; results in `benchmarks/results/<name>.json`."""
