"""Leave out huggingface_hub, unless razor_local.models or the application imports it."""

excludedimports = ["huggingface_hub"]
