"""Checkpoint files: local or on the hub, safetensors and JSON, any layout, as one namespace of hub names."""
