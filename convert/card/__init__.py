"""The model card of a folder of GGUF files: its text, its folder, and the card of a conversion."""
