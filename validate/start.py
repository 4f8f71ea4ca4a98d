"""Entry point of `validate-kimi`: says what to install where the packages of the `validate` extra are missing."""

from __future__ import annotations

import sys

PACKAGES = ("torch", "safetensors", "matplotlib")


def main() -> int:
    """Run the command; return its exit status, 2 if a package is missing."""
    try:
        from kimi_gguf.validate.cli import main as run
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        print(
            f"validate-kimi: error: the package {error.name} is missing; "
            "install kimi-gguf with its extra: pip install 'kimi-gguf[validate]' or 'FILE.whl[validate]'",
            file=sys.stderr,
        )
        return 2
    return run()
