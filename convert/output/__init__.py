"""GGUF output: header, data, splits, and the journal of an unfinished file."""
