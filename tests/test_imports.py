"""Imports between packages have one direction: tools -> scripts -> bench, validate -> convert -> engine ->
patches.

Parsed from the sources, so that imports inside functions count, and so do module names in strings, as in
`python -m`, `import_module` and code for another process. Tests do not belong to any package, and no package imports
them; but tools/bench-gpu --rehearse and tools/cuda_check.py use files of tests/.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The packages that each package may import. ggml_ops has data and the programs that generate it; no package imports it.
ALLOWED = {
    "patches": set[str](),
    "engine": {"patches"},
    "convert": {"engine", "patches"},
    "bench": {"convert", "engine", "patches"},
    "validate": {"convert", "engine", "patches"},
    "ggml_ops": {"convert", "engine", "patches"},
    "scripts": {"bench", "validate", "convert", "engine", "patches"},
    "tools": {"scripts", "bench", "validate", "convert", "engine", "patches"},
}
BY_NAME = {
    "import_module",
    "__import__",
    "run_module",
    "run_path",
}  # functions that import a module by its name
MODULE = re.compile(r"\bkimi_gguf\.(\w+)")
# Names under which tests import each other's code, see pythonpath in pyproject.toml.
TESTS = {"tests", "conftest", "emulators", *(file.stem for file in (ROOT / "tests/support").glob("*.py"))}


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and package of every import of `kimi_gguf.PACKAGE`; relative imports give the package ".", all of kimi_gguf
    or a name that is not written out gives "*", and code of the tests gives "tests"."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "."
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if node.module == "kimi_gguf" and node.names[0].name == "*":
                yield node.lineno, "*"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in BY_NAME:
            name = node.args[0] if node.args else None
            whole = isinstance(name, ast.Constant) and re.match(r"[a-z_]+\b", str(name.value))
            if not whole or ast.unparse(node.func) == "__import__":
                yield node.lineno, "*"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        for name in names:
            for match in MODULE.finditer(name):
                if match[1] in ALLOWED:
                    yield node.lineno, match[1]
            if isinstance(node, ast.Import) and name == "kimi_gguf":
                yield node.lineno, "*"
            if not isinstance(node, ast.Constant) and name.split(".")[0] in TESTS:
                yield node.lineno, "tests"


def wrong_imports(package: str) -> list[str]:
    return [
        f"{file.relative_to(ROOT)}:{line}: {package} imports {other}"
        for file in sorted((ROOT / package).rglob("*.py"))
        for line, other in imported(file.read_text(encoding="utf-8"))
        if other not in {package, *ALLOWED[package]}
    ]


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_imports_only_what_is_below_it(package: str) -> None:
    assert wrong_imports(package) == []


def test_every_package_is_listed() -> None:
    packages = {file.parent.name for file in ROOT.glob("*/__init__.py")}
    assert packages - {"tests"} == set(ALLOWED)


@pytest.mark.parametrize(
    "source",
    [
        "from kimi_gguf.validate.errors import ValidateError",
        "import kimi_gguf.validate",
        "from kimi_gguf import validate",
        "def f():\n    from kimi_gguf.validate import cli",
        "if TYPE_CHECKING:\n    import kimi_gguf.validate.cli as cli",
        "command = [sys.executable, '-m', 'kimi_gguf.validate.cli']",
        "import_module('kimi_gguf.validate.cli')",
        "command = [sys.executable, '-c', 'from kimi_gguf.validate.cli import main; main()']",
        "command = 'python -m kimi_gguf.validate.cli'",
    ],
)
def test_every_form_of_import_is_seen(source: str) -> None:
    assert [package for _, package in imported(source)] == ["validate"]


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("import kimi_gguf", "*"),
        ("from kimi_gguf import *", "*"),
        ("import_module('.validate.cli', 'kimi_gguf')", "*"),
        ("importlib.import_module('kimi_gguf.' + name)", "*"),
        ("__import__('kimi_gguf', fromlist=['validate'])", "*"),
        ("runpy.run_path(folder / 'cli.py')", "*"),
        ("from . import validate", "."),
        ("import random_checkpoint", "tests"),
        ("from emulators.cuda import link_program", "tests"),
    ],
)
def test_imports_that_no_package_may_have_are_seen(source: str, seen: str) -> None:
    assert [package for _, package in imported(source)] == [seen]
