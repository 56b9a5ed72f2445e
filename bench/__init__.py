"""Benchmarks: one script a claim, each with its peer, and one JSON record a claim in `results/`.
None of them gates a test."""
