"""GGUF output: header, data, splits, the journal of an unfinished file, and the model card."""
