"""Runs Metal kernels on the CPU, under ggml-metal's own host code: without a Mac (README.md)."""

from emulators.metal.build import CompileError, compile_backend, compile_device
from emulators.metal.rewrite import RewriteError

__all__ = ["CompileError", "RewriteError", "compile_backend", "compile_device"]
