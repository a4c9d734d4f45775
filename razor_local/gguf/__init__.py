"""Bounded readers of GGUF files."""
