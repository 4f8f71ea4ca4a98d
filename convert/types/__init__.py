"""Tensor types: what each is, which tensor gets which (mixes), and the encoding of values."""
