"""Benchmarks, each one command: `python -m benchmarks.<name>`; results in `benchmarks/results/<name>.json`.

Like the stages, they were run with MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=17179869184 (see
`dive_lib/run.py`); without these two small models are slower.
"""
