"""The series: patches apply exactly or not at all, only once, and produce the pinned tree."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path, PurePosixPath

import pytest
import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_gguf.patches import diff
from kimi_gguf.patches.errors import PatchError
from kimi_gguf.patches.export import export_patches
from kimi_gguf.patches.pin import load_pin
from kimi_gguf.patches.series import FIXES, PATCH_FOLDER, Patch, Series, destination, load_series
from kimi_gguf.patches.tree import Tree, tree_hash
from kimi_gguf.tools import patches as patches_command
from kimi_gguf.tools.patch_index import PAGE


@pytest.fixture
def tiny(tmp_path: Path) -> tiny_llama.Tiny:
    return tiny_llama.make(tmp_path)


def test_patch_and_operator_source_reach_the_tree(tiny: tiny_llama.Tiny, tmp_path: Path) -> None:
    tree = Tree(tmp_path / "tree")
    assert tiny.series.apply(tree) == 1
    tree.write_to(tmp_path / "out")
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "patched") == tree.hash()


def test_applying_again_changes_nothing(tiny: tiny_llama.Tiny, tmp_path: Path) -> None:
    tree = Tree(tmp_path / "patched")
    assert tiny.series.applied(tree) == 1
    assert tiny.series.apply(tree) == 0
    assert not tree.changed()


def with_operator(folder: Path) -> Series:
    """The miniature's series with a second patch, which belongs to an operator."""
    second = tiny_llama.PATCH.replace("answer", "steady").replace("return 1", "return 5")
    second = second.replace("KIMI_ANSWER", "6").replace('+#include "kimi.h"', "+// six")
    second = second.replace("Sources: llama/tiny\n", "")
    tiny_llama.write_tree(folder / "series", {"ops/0002-steady.patch": second})
    return load_series(folder / "series", folder / "ops")


def test_a_series_half_applied_is_completed(tmp_path: Path) -> None:
    tiny = tiny_llama.make(tmp_path)
    series = with_operator(tmp_path)
    tree = Tree(tmp_path / "tree")
    assert tiny.series.apply(tree) == 1
    assert series.applied(tree) == 1
    assert series.apply(tree) == 1
    assert tree.read("src/steady.cpp") == b"// six\n\nint steady() {\n    return 6;\n}\n"


def test_a_patch_that_does_not_apply_names_patch_file_and_lines(
    tiny: tiny_llama.Tiny, tmp_path: Path
) -> None:
    (tmp_path / "tree/src/answer.cpp").write_text("int answer() {\n    return 3;\n}\n")
    with pytest.raises(PatchError) as caught:
        tiny.series.apply(Tree(tmp_path / "tree"))
    for part in ("0001-answer.patch", "src/answer.cpp", "'return 1;'", "'return 3;'"):
        assert part in str(caught.value)
    assert caught.value.todo


def test_an_operator_source_never_replaces_a_file(tiny: tiny_llama.Tiny, tmp_path: Path) -> None:
    (tmp_path / "tree/src/kimi.h").write_text("upstream's own\n")
    with pytest.raises(PatchError, match=r"src/kimi\.h"):
        tiny.series.apply(Tree(tmp_path / "tree"))


def test_a_hunk_is_found_where_its_lines_have_moved_to(tiny: tiny_llama.Tiny, tmp_path: Path) -> None:
    (tmp_path / "tree/src/answer.cpp").write_text("// new\n" * 40 + "int answer() {\n    return 1;\n}\n")
    tree = Tree(tmp_path / "tree")
    tiny.series.apply(tree)
    content = tree.read("src/answer.cpp")
    assert content is not None
    assert content.startswith(b"// new\n" * 40 + b'#include "kimi.h"\n')


OPERATOR = "int operator_source() {\n    return 0;\n}\n"

lines = st.lists(st.sampled_from(["a", "b", "c", "", "\tx", "€", "-- ", "@@ -1 +1 @@", "a\r"]), max_size=30)
texts = st.builds(lambda many, end: "\n".join(many) + ("\n" if end else ""), lines, st.booleans())


@settings(max_examples=60, deadline=None)
@given(old=texts, new=texts)
def test_diffs_of_git_are_applied_and_taken_back(
    tmp_path_factory: pytest.TempPathFactory, old: str, new: str
) -> None:
    folder = tmp_path_factory.mktemp("diff")
    for side, text in (("a", old), ("b", new)):
        (folder / side).mkdir()
        if text:
            (folder / side / "file").write_bytes(text.encode())
    command = ["git", "diff", "--no-index", "--no-prefix", "--no-renames", "a", "b"]
    patch = subprocess.run(command, cwd=folder, capture_output=True, check=False).stdout
    tree = Tree(folder / "a")
    for change in diff.parse(patch, "test"):
        diff.apply(tree, change)
    assert (tree.read("file") or b"") == new.encode()
    for change in diff.parse(patch, "test"):
        diff.apply(tree, change.reversed())
    assert (tree.read("file") or b"") == old.encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((" b/src/answer.cpp\n@@", " b/../../etc/passwd\n@@"), "unfit path"),
        (("--- a/src/answer.cpp", "--- /src/answer.cpp"), "unfit path"),
        (("--- a/src/answer.cpp", "--- a/src/other.cpp"), "renamed"),
        (("@@ -1,3 +1,5 @@", "@@ -1,9 +1,11 @@"), "cut short"),
        (("--- a/src", "old mode 100644\nnew mode 100755\n--- a/src"), "old mode"),
    ],
)
def test_unfit_patches_are_refused_by_name(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in tiny_llama.PATCH
    with pytest.raises(PatchError, match=message) as caught:
        tiny_llama.make(tmp_path, patch=tiny_llama.PATCH.replace(*change))
    assert "0001-answer.patch" in str(caught.value)


@pytest.mark.parametrize(
    ("sources", "named", "message"),
    [
        (["tiny/cpu/other.cpp"], "llama/tiny", r"tiny/cpu/other\.cpp"),
        ([], "llama/none", r"0001-answer\.patch: the folder llama/none"),
        (["a/cpu/same.cpp", "b/cpu/same.cpp"], "a/cpu b/cpu", r"ggml/src/ggml-cpu/kimi/same\.cpp"),
    ],
    ids=["a source without a patch", "a folder without sources", "two sources with one place"],
)
def test_sources_that_do_not_fit_the_series_are_refused(
    tmp_path: Path, sources: list[str], named: str, message: str
) -> None:
    tiny_llama.write_tree(tmp_path / "ops", dict.fromkeys(sources, OPERATOR))
    with pytest.raises(PatchError, match=message):
        tiny_llama.make(tmp_path, patch=tiny_llama.PATCH.replace("llama/tiny", named))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("kda/ggml-kda-conv.h", "ggml/include/ggml-kda-conv.h"),
        ("kda/ggml-kda-conv.c", "ggml/src/kimi/ggml-kda-conv.c"),
        ("kda/conv-oracle.h", None),
        ("kda/cpu/kda-scan.cpp", "ggml/src/ggml-cpu/kimi/kda-scan.cpp"),
        ("kda/metal/kda.metal", "ggml/src/ggml-metal/kernels/kda.metal"),
        ("kda/graph/llama-kda.h", "src/kimi/llama-kda.h"),
        ("verify/program/kimi-verify.cpp", "ggml/src/kimi/program/kimi-verify.cpp"),
        ("kda/tests/kda-test-cases.h", "tests/kimi/kda-test-cases.h"),
        ("llama/tokenizer_split/kimi-split.cpp", "src/kimi-split.cpp"),
    ],
)
def test_the_place_of_a_source_follows_from_its_folder(source: str, expected: str | None) -> None:
    assert destination(PurePosixPath(source)) == expected


def test_the_tree_hash_sees_names_contents_and_borders(tmp_path: Path) -> None:
    trees = [{"a": "x"}, {"b": "x"}, {"a": "y"}, {"a": "x", "b": ""}, {"ab": "x"}]
    hashes = {tree_hash(tiny_llama.write_tree(tmp_path / str(i), files)) for i, files in enumerate(trees)}
    assert len(hashes) == 5
    tiny_llama.write_tree(tmp_path / "0", {".git/HEAD": "ref\n"})
    assert tree_hash(tmp_path / "0") in hashes


def test_writing_a_tree_touches_only_what_differs(tiny: tiny_llama.Tiny, tmp_path: Path) -> None:
    tree = Tree(tmp_path / "tree")
    tree.write_to(tmp_path / "out")
    (tmp_path / "out/stale.cpp").write_text("left over\n")
    before = (tmp_path / "out/src/steady.cpp").stat().st_mtime_ns
    tiny.series.apply(tree)
    assert tree.write_to(tmp_path / "out") == ["stale.cpp", "src/answer.cpp", "src/kimi.h"]
    assert (tmp_path / "out/src/steady.cpp").stat().st_mtime_ns == before
    assert tree_hash(tmp_path / "out") == tree.hash()


def git_am(checkout: Path, patches: list[Path]) -> None:
    """Make the folder a git repository and apply the mailed patches."""
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "-Af", "."], ["commit", "-q", "-m", "upstream"]):
        subprocess.run(["git", *identity, *command], cwd=checkout, check=True)
    subprocess.run(["git", *identity, "am", "-q", *patches], cwd=checkout, check=True, capture_output=True)


def test_the_exported_series_gives_the_same_tree_by_git_am(tiny: tiny_llama.Tiny, tmp_path: Path) -> None:
    mails = export_patches(tiny.series, tmp_path / "mail")
    git_am(tmp_path / "tree", mails)
    assert tree_hash(tmp_path / "tree") == tree_hash(tmp_path / "patched")
    log = ["git", "log", "-1", "--format=%s%n%b"]
    message = subprocess.run(log, cwd=tmp_path / "tree", capture_output=True, text=True, check=True).stdout
    assert message.startswith("tiny: answer two\nTwo is the better answer.\n")


def test_the_fixes_are_exported_alone(tiny: tiny_llama.Tiny, tmp_path: Path) -> None:
    series = with_operator(tmp_path)
    assert len(series.patches) == 2
    mails = export_patches(series.fixes(), tmp_path / "mail")
    assert [path.name for path in mails] == ["fixes-0001-answer.patch"]
    git_am(tmp_path / "tree", mails)
    assert tree_hash(tmp_path / "tree") == tree_hash(tmp_path / "patched")


def test_a_folder_with_files_is_no_target_of_an_export(tiny: tiny_llama.Tiny, tmp_path: Path) -> None:
    tiny_llama.write_tree(tmp_path / "mail", {"README": "x"})
    (tmp_path / "link").symlink_to(tmp_path / "mail")
    for target in (tmp_path / "mail", tmp_path / "link", tmp_path / "mail/README"):
        with pytest.raises(PatchError, match="exists already"):
            export_patches(tiny.series, target)
    assert [each.read_text() for each in (tmp_path / "mail").iterdir()] == ["x"]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series = with_operator(tmp_path)
    before = sorted(tmp_path.iterdir())

    def fail(patch: Patch, number: int, total: int) -> bytes:
        if number == total:
            raise KeyboardInterrupt
        return b"complete"

    monkeypatch.setattr("kimi_gguf.patches.export.as_mail", fail)
    with pytest.raises(KeyboardInterrupt):
        export_patches(series, tmp_path / "mail")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "source",
    [
        "tiny/cpu/x.hpp", "tiny/cpu/arm/x.cpp", "tiny/vulkan/x.cpp", "x.cpp",
    ],
)  # fmt: skip
def test_a_source_that_would_not_be_compiled_is_refused(tmp_path: Path, source: str) -> None:
    tiny_llama.write_tree(tmp_path / "ops", {source: OPERATOR, "tiny/cpu/.draft.cpp": OPERATOR})
    with pytest.raises(PatchError, match=rf"{source}: a source that no rule copies"):
        load_series(overlay_folder=tmp_path / "ops")


def test_each_patch_of_the_project_says_why_and_when_it_may_be_dropped() -> None:
    for patch in load_series().patches:
        assert patch.subject != patch.name, f"{patch.name}: no subject"
        for field in ("Effect", "Upstream", "Drop when"):
            assert patch.field(field), f"{patch.name}: no {field}"
        test = patch.field("Test")
        assert test and (PATCH_FOLDER.parent / test).is_file(), f"{patch.name}: the test {test}"


def test_a_number_is_given_once_and_fixes_come_first() -> None:
    patches = load_series().patches
    assert (
        len({patch.name[:4] for patch in patches}) == len(patches) == len(list(PATCH_FOLDER.rglob("*.patch")))
    )
    kinds = [patch.kind == FIXES for patch in patches]
    assert kinds == sorted(kinds, reverse=True)


def added_code(patch: Patch) -> int:
    """The lines that the patch adds to files of upstream, without blank lines and comments."""
    added = re.findall(r"(?m)^\+(?!\+\+ )[ \t]*(\S.*)$", patch.text.decode())
    return sum(not line.startswith(("//", "/*", "* ")) for line in added)


def test_a_patch_of_ops_holds_call_sites() -> None:
    ops = [patch for patch in load_series().patches if patch.kind != FIXES]
    assert len(ops) <= 22
    too_large = {patch.name: added_code(patch) for patch in ops if added_code(patch) > 120}
    assert not too_large, "move the logic into files of ggml_ops"


def test_the_index_pages_are_those_that_the_command_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {}
    for name in ("PAGE", "UPSTREAM_PAGE"):
        page = getattr(patches_command, name)
        written[page] = Path(shutil.copy(page, tmp_path))
        monkeypatch.setattr(patches_command, name, written[page])
    written[PAGE].write_text("", encoding="utf-8")
    assert patches_command.main(["index"]) == 0
    for page, copy in written.items():
        assert page.read_text(encoding="utf-8") == copy.read_text(encoding="utf-8"), (
            "run: tools/run patches index"
        )


def test_patches_need_earlier_ones() -> None:
    names: list[str] = []
    for patch in load_series().patches:
        assert set(patch.needs) <= set(names), f"{patch.name} needs {patch.needs}"
        names.append(patch.name.removesuffix(".patch"))


def test_the_pin_is_complete_and_the_series_digest_follows_its_contents(tiny: tiny_llama.Tiny) -> None:
    pin = load_pin()
    assert len(pin.archive_sha256) == len(pin.patched_tree_sha256) == 64
    assert tiny.series.digest() != Series(()).digest()
    (patch, *others) = tiny.series.patches
    reworded = dataclasses.replace(patch, text=b"More words.\n" + patch.text)
    assert Series((reworded, *others)).digest() == tiny.series.digest(), "headers are not compiled"
    changed = dataclasses.replace(patch, text=patch.text + b" ")
    assert Series((changed, *others)).digest() != tiny.series.digest()
