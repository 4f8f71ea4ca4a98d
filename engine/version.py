"""The version of kimi-gguf: the one place where it is written. pyproject.toml reads it from here.

`.dev0`: the version that CHANGELOG.md calls "not released".
"""

from typing import Final

VERSION: Final = "0.2.0.dev0"
