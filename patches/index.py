"""The index of the series, `README.md` in this folder, and the tables of docs/upstream.md, made from the headers.

Input: the series. Output: the pages as text.
"""

from __future__ import annotations

from pathlib import Path

from kimi_gguf.patches.errors import PatchError
from kimi_gguf.patches.pull_requests import NO_TEST, PullRequest, load_pull_requests
from kimi_gguf.patches.series import FIXES, OPS, Patch, Series

PAGE = Path(__file__).with_name("README.md")
UPSTREAM_PAGE = Path(__file__).resolve().parents[1] / "docs" / "upstream.md"
BEGIN = "<!-- generated: python -m kimi_gguf.patches index -->\n"
END = "<!-- end -->\n"
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

A file `fixes/NNNN-name.pr` is the fix's test for upstream ([pull_requests.py](pull_requests.py)).
`tools/pull-requests DIR` writes the fixes as pull requests; [docs/upstream.md](../docs/upstream.md) lists them.
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


def upstream_page(series: Series, page: str) -> str:
    """docs/upstream.md with the tables of this series."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise PatchError(
            f"{UPSTREAM_PAGE}: no tables", expected=f"a line {BEGIN.strip()} and a line {END.strip()}"
        )
    requests = load_pull_requests(series)
    tested = sum(request.test is not None for request in requests)
    lines = [f"\n{len(requests)} fixes, {tested} with a test for upstream.\n"]
    lines += ["| number | title | test | builds on | state |", "| --- | --- | --- | --- | --- |"]
    lines += map(_request_row, requests)
    lines += ["", "| number | operators, and what uses them | effect | state |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {_link(patch, '../patches/')} | {patch.subject} | {patch.field('Effect')} | {patch.field('Upstream')} |"
        for patch in series.patches
        if patch.kind == OPS
    ]
    return before + begin + "\n".join(lines) + "\n\n" + end + after


def _request_row(request: PullRequest) -> str:
    test = f"`{request.test.run}`" if request.test else NO_TEST
    needs = ", ".join(each.name.split("-")[0] for each in request.needs)
    state = request.patch.field("Upstream")
    test = test.replace("|", r"\|")  # a table's cell
    return f"| {_link(request.patch, '../patches/')} | {request.title} | {test} | {needs} | {state} |"


def _link(patch: Patch, folder: str = "") -> str:
    return f"[{patch.name.split('-')[0]}]({folder}{patch.kind}/{patch.name})"


def _row(patch: Patch) -> str:
    number = _link(patch)
    needs = ", ".join(name.split("-")[0] for name in patch.needs)
    subject = patch.subject + (f" (needs {needs})" if needs else "")
    where = "<br>".join(f"`{diff.path}`" for diff in patch.diffs)
    test = patch.field("Test") or ""
    link = f"[{Path(test).stem}](../{test})"
    return (
        f"| {number} | {subject} | {patch.field('Effect')} | {where} | {link} | {patch.field('Drop when')} |"
    )
