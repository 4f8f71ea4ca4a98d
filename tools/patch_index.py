"""The index of the series, patches/README.md, and the tables of docs/upstream.md, made from the headers.

Input: the series. Output: the pages as text.
"""

from __future__ import annotations

from pathlib import Path

from kimi_gguf.patches.errors import PatchError
from kimi_gguf.patches.series import FIXES, OPS, Patch, Series
from kimi_gguf.tools.pull_request import NO_TEST, PullRequest, load_pull_requests

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "patches" / "README.md"
UPSTREAM_PAGE = ROOT / "docs" / "upstream.md"
BEGIN = "<!-- generated: tools/run patches index -->\n"
END = "<!-- end -->\n"
HEAD = """# Patches

The engine is the pinned llama.cpp (`upstream.toml`) with these patches and the sources in [ggml_ops](../ggml_ops).
`tools/run patches index` writes this page from the headers of the patches; the names are those of the files.

| folder | what |
| --- | --- |
| `fixes/` | corrections of upstream; each applies alone, or on the one fix that it names in `Needs:` |
| `ops/` | call sites of our operators; changes to batches, memory, server, RPC; each applies on all patches before it |

A number is never given again: a patch that was merged into another leaves a gap. `kimi-llama export-patches DIR` writes
the whole series for `git am`; with `--fixes`, only the corrections. The header of a patch says what is wrong, where,
how it is corrected, its test, and when it can be dropped. `Sources:` names the folders of ggml_ops whose files the
patch adds; the folder determines where they go ([series.py](series.py)).

A file `fixes/NNNN-name.pr` is the fix's test for upstream ([pull_request.py](../tools/pull_request.py)).
`tools/pull-requests DIR` writes the fixes as pull requests; [docs/upstream.md](../docs/upstream.md) lists them.
"""


def index_page(series: Series) -> str:
    """The whole page."""
    lines = [HEAD]
    for title, kind, effect in (("Fixes", FIXES, "effect without it"), ("Operators", OPS, "effect")):
        lines += [f"## {title}", "", f"| patch | {effect} |", "| --- | --- |"]
        lines += [_row(patch) for patch in series.patches if patch.kind == kind]
        lines += [""]
    return "\n".join(lines)


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
    lines += ["| pull request | builds on | test | upstream |", "| --- | --- | --- | --- |"]
    lines += map(_request_row, requests)
    return before + begin + "\n".join(lines) + "\n\n" + end + after


def _request_row(request: PullRequest) -> str:
    test = f"`{request.test.run}`" if request.test else NO_TEST
    test = test.replace("|", r"\|")  # a table's cell
    needs = ", ".join(needed.name.split("-")[0] for needed in request.needs)
    state = (request.patch.field("Upstream") or "").removeprefix("not yet forwarded").removeprefix("; ")
    link = f"[{request.name[:4]}](../patches/{request.patch.kind}/{request.patch.name})"
    return f"| {link} {request.title} | {needs} | {test} | {state} |"


def _row(patch: Patch) -> str:
    return f"| {patch.name.removesuffix('.patch')} | {patch.field('Effect')} |"
