"""CUDA kernels on the CPU: what they compute and what they do wrong, without a GPU (README.md)."""

from emulators.cuda.build import CompileError, compile_objects, link_program
from emulators.cuda.rewrite import RewriteError

__all__ = ["CompileError", "RewriteError", "compile_objects", "link_program"]
