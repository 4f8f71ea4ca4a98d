"""Adapters of PEFT: read, converted to GGUF."""
