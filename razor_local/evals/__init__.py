"""Measure what compression costs in quality: the tasks of `razor-local eval`."""
