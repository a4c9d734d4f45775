"""llama-server with RazorAttention: builds it, and starts it for a model."""
