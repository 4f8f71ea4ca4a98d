"""CUDA kernels on the CPU: what they compute and what they do wrong, without a GPU (README.md)."""

from kimi_gguf.ggml_ops.cuda_emulator.build import (
    CompileError,
    compile_objects,
    compile_program,
    link_program,
)
from kimi_gguf.ggml_ops.cuda_emulator.rewrite import RewriteError

__all__ = ["CompileError", "RewriteError", "compile_objects", "compile_program", "link_program"]
