"""The model: config, tensor table, tokenizer and GGUF metadata."""
