"""Converters from a model or a published head list to a razor profile in a GGUF file."""
