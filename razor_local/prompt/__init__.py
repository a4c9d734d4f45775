"""Turn messages into tokens."""
