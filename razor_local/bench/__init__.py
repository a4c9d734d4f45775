"""Benchmark razor against a full cache."""
