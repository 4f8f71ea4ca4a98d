"""Tools for changing the series: `tools/run patches verify TREE | record TREE | index`.

TREE is a folder with upstream's llama.cpp. `verify` checks that the series turns it into the tree whose hash is
pinned. `record` pins the hash of the tree that the series makes of it. `index` writes patches/README.md and the
tables of docs/upstream.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kimi_gguf.patches.errors import PatchError
from kimi_gguf.patches.pin import load_pin, record_patched_tree
from kimi_gguf.patches.series import load_series
from kimi_gguf.patches.tree import Tree, expect_tree
from kimi_gguf.tools.patch_index import PAGE, UPSTREAM_PAGE, index_page, upstream_page

_NOT_PINNED = "not the pinned upstream llama.cpp"
_GIVE = "give the tree with the expected hash; for a new pin write the hash found to upstream.toml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if words == ["index"]:
        series = load_series()
        PAGE.write_text(index_page(series), encoding="utf-8")
        page = upstream_page(series, UPSTREAM_PAGE.read_text(encoding="utf-8"))
        UPSTREAM_PAGE.write_text(page, encoding="utf-8")
        return 0
    if len(words) != 2 or words[0] not in ("verify", "record"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        tree = Tree(Path(words[1]))
        if words[0] == "record":
            expect_tree(tree.hash(), load_pin().upstream_tree_sha256, str(tree.root), _GIVE, _NOT_PINNED)
        series = load_series()
        series.apply(tree)
        digest = tree.hash()
        if words[0] == "record":
            record_patched_tree(digest)
    except PatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    pinned = load_pin().patched_tree_sha256
    for patch in series.patches:
        print(f"{patch.name}: {patch.subject}")
    print(f"patched tree {digest}: {'as pinned' if digest == pinned else f'but {pinned} is pinned'}")
    return 0 if digest == pinned else 1


if __name__ == "__main__":
    sys.exit(main())
