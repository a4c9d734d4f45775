"""Verify a running model against the reference."""
