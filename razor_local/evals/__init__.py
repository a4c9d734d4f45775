"""Measure the quality of compressed caches: the tasks of `razor-local eval`."""
