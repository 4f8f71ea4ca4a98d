"""Entry point of `validate-kimi`: says what to install where the packages of the `validate` extra are missing."""

from __future__ import annotations

import sys

from kimi_gguf.engine.errors import install

PACKAGES = ("torch", "safetensors", "matplotlib")


def main() -> int:
    """Run the command; return its exit status, 2 if a package is missing."""
    try:
        from kimi_gguf.validate.cli import main as run
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        print(
            f"validate-kimi: error: {error.name} is missing; it is part of the extra [validate]: {install(*PACKAGES)}",
            file=sys.stderr,
        )
        return 2
    return run()
