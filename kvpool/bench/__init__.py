"""Benchmarks: each compares with something measured in the same run."""
