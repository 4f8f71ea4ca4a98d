"""A pytest plugin that runs upstream's tests of the server without a network.

Upstream downloads its models before the first test. Our tests write theirs, so the download is omitted.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

# upstream's conftest.py imports it, before pytest_configure; only downloads use it
sys.modules.setdefault("wget", ModuleType("wget"))


def pytest_configure() -> None:
    """Replace the download; `utils` is the module in tools/server/tests, the current directory."""
    utils = importlib.import_module("utils")
    utils.ServerPreset.load_all = staticmethod(lambda: None)
