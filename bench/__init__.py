"""Benchmarks: ratios against a bare client on the same machine, in the same run. Nothing here asserts a time."""
