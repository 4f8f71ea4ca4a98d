"""The generated parts of docs/testing.md: how many faults are planted, what was found, and what each folder costs.

Input: tests/durations.json, which `scripts/test --record-durations` writes, and the tables of faults in the tests.
Output: the page, written; with --check, exit status 1 if it differs.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "testing.md"
DURATIONS = ROOT / "tests" / "durations.json"
PART = re.compile(r"(<!-- generated: tools/run testing_page -->\n).*?(<!-- end -->\n)", re.DOTALL)
SLOW = 5  # files of the default tier that the page names


def page(text: str) -> str:
    """The page with its generated parts, in their order, made again."""
    parts = iter((_faults(), _found(), _costs()))
    return PART.sub(lambda match: f"{match[1]}\n{next(parts)}\n{match[2]}", text)


def _costs() -> str:
    tiers: dict[str, dict[str, tuple[int, float]]] = json.loads(DURATIONS.read_text(encoding="utf-8"))
    lines = ["| tier | tests of | files | cases | seconds |", "| --- | --- | ---: | ---: | ---: |"]
    for tier, files in tiers.items():
        folders: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for name, file in files.items():
            folders["/".join(name.split("/")[:-1])].append(file)
        rows = [*sorted(folders.items()), ("**together**", [*files.values()])]
        for folder, costs in rows:
            cases, seconds = (sum(cost[i] for cost in costs) for i in (0, 1))
            lines.append(f"| {tier} | {folder} | {len(costs)} | {cases} | {seconds:.0f} |")
    slowest = sorted(tiers["default"].items(), key=lambda file: -file[1][1])[:SLOW]
    named = ", ".join(f"{Path(name).name} {seconds:.0f} s" for name, (_, seconds) in slowest)
    return "\n".join([*lines, "", f"The slowest files of the default tier: {named}.", ""])


def _faults() -> str:
    """From the tables that are named FAULTS: one entry, one case."""
    lines = ["| faults of | planted |", "| --- | ---: |"]
    total = 0
    for path in [ROOT / "tools" / "faults.py", *sorted((ROOT / "tests").rglob("test_*.py"))]:
        count = sum(
            len(node.value.keys)
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            and isinstance(node.value, ast.Dict)
            and "FAULTS" in ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        )
        if count:
            lines.append(f"| [{path.stem}](../{path.relative_to(ROOT)}) | {count} |")
            total += count
    return "\n".join([*lines, f"| together | {total} |", ""])


def _found() -> str:
    """The corrections of llama.cpp, and those that upstream can test."""
    fixes, tests = (len([*(ROOT / "patches" / "fixes").glob(f"*.{kind}")]) for kind in ("patch", "pr"))
    return f"{fixes} corrections of llama.cpp; {tests} of them have a test for upstream.\n"


def main() -> int:
    """Write or check the page; return the exit status."""
    text = PAGE.read_text(encoding="utf-8")
    made = page(text)
    if sys.argv[1:] == ["--check"]:
        return int(made != text)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
