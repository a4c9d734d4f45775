"""The check of a real model against the reference."""
