"""The index of the series, `README.md` in this folder, made from the headers of the patches.

Input: the series. Output: the page as text.
"""

from __future__ import annotations

from pathlib import Path

from kimi_gguf.patches.series import FIXES, OPS, Patch, Series

PAGE = Path(__file__).with_name("README.md")
HEAD = """# Patches

The engine is the pinned llama.cpp (`upstream.toml`) with these patches and the sources in [ggml_ops](../ggml_ops).
`python -m kimi_gguf.patches index` writes this page from the headers of the patches.

| folder | what |
| --- | --- |
| `fixes/` | corrections of upstream; each applies alone, or on the one fix that it names in `Needs:` |
| `ops/` | call sites of our operators; changes to batches, memory, server, RPC; each applies on all patches before it |

`kimi-llama export-patches DIR` writes the whole series for `git am`; with `--fixes`, only the corrections. The header
of a patch says what is wrong, where, what the effect is and how it is corrected. `Sources:` names the folders of
ggml_ops whose files the patch adds; the folder determines where they go ([series.py](series.py)).
"""


def index_page(series: Series) -> str:
    """The whole page."""
    fixes = [patch for patch in series.patches if patch.kind == FIXES]
    ops = [patch for patch in series.patches if patch.kind == OPS]
    lines = [HEAD, "## Fixes", "", "| number | corrects | effect without it | where | test | drop when |"]
    lines += ["| --- | --- | --- | --- | --- | --- |", *map(_row, fixes)]
    lines += ["", "## Operators", "", "| number | calls | effect | where | test | drop when |"]
    lines += ["| --- | --- | --- | --- | --- | --- |", *map(_row, ops)]
    return "\n".join(lines) + "\n"


def _row(patch: Patch) -> str:
    number = f"[{patch.name.split('-')[0]}]({patch.kind}/{patch.name})"
    needs = ", ".join(name.split("-")[0] for name in patch.needs)
    subject = patch.subject + (f" (needs {needs})" if needs else "")
    where = "<br>".join(f"`{diff.path}`" for diff in patch.diffs)
    test = patch.field("Test") or ""
    link = f"[{Path(test).stem}](../{test})"
    return (
        f"| {number} | {subject} | {patch.field('Effect')} | {where} | {link} | {patch.field('Drop when')} |"
    )
