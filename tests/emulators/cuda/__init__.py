"""Runs CUDA kernels on the CPU: finds what they compute and their faults, without a GPU (README.md)."""

from emulators.cuda.build import CompileError, compile_objects, link_program
from emulators.cuda.rewrite import RewriteError

__all__ = ["CompileError", "RewriteError", "compile_objects", "link_program"]
