"""Leave out what Llama.from_pretrained() downloads with; razor_local.models imports it itself."""

excludedimports = ["huggingface_hub"]
