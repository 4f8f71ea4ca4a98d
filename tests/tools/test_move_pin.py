"""The series on another llama.cpp: all conflicts are reported with file and line, and nothing changes unless asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_llama

from kimi_gguf.patches.errors import PatchError
from kimi_gguf.patches.pin import PIN_FILE, load_pin
from kimi_gguf.patches.series import Series, load_series
from kimi_gguf.patches.tree import Tree, tree_hash
from kimi_gguf.tools.move_pin import main, move
from kimi_gguf.tools.series_trial import APPLIES, CONFLICTS, IN_UPSTREAM, try_series

FIRST = """Subject: [PATCH] numbers: larger

Larger.

---
diff --git a/src/numbers.cpp b/src/numbers.cpp
--- a/src/numbers.cpp
+++ b/src/numbers.cpp
@@ -1,3 +1,3 @@
 int one() {
-    return 1;
+    return 10;
 }
@@ -5,3 +5,3 @@
 int two() {
-    return 2;
+    return 20;
 }
diff --git a/src/gone.cpp b/src/gone.cpp
--- a/src/gone.cpp
+++ b/src/gone.cpp
@@ -1 +1 @@
-int gone();
+int here();
"""
SECOND = """Subject: [PATCH] numbers: a third

---
diff --git a/src/numbers.cpp b/src/numbers.cpp
--- a/src/numbers.cpp
+++ b/src/numbers.cpp
@@ -9,3 +9,3 @@
 int three() {
-    return 3;
+    return 30;
 }
"""
NUMBERS = (
    "int one() {\n    return 1;\n}\n\nint two() {\n    return 2;\n}\n\nint three() {\n    return 3;\n}\n"
)
PINNED = {"src/numbers.cpp": NUMBERS, "src/gone.cpp": "int gone();\n"}


@pytest.fixture
def series(tmp_path: Path) -> Series:
    patches = {"fixes/0001-larger.patch": FIRST, "fixes/0002-third.patch": SECOND}
    tiny_llama.write_tree(tmp_path / "series", patches)
    return load_series(tmp_path / "series", tmp_path / "no-sources")


def trials(folder: Path, series: Series, **files: str) -> list[tuple[str, tuple[str, ...]]]:
    """Verdict and conflicts of each patch on the pinned tree with other contents of src/NAME.cpp."""
    changed = {f"src/{name}.cpp": text for name, text in files.items()}
    tree = Tree(tiny_llama.write_tree(folder / "tree", PINNED | changed))
    return [(trial.verdict, trial.conflicts) for trial in try_series(tree, series)]


def test_every_conflict_is_named_with_file_and_line_and_the_rest_is_applied(
    tmp_path: Path, series: Series
) -> None:
    other = "// new\n// new\n" + NUMBERS.replace("return 1", "return 7").replace("return 2", "return 8")
    tree = Tree(tiny_llama.write_tree(tmp_path / "tree", {"src/numbers.cpp": other}))
    first, second = try_series(tree, series)
    assert (first.verdict, second.verdict) == (CONFLICTS, APPLIES)
    one, two, gone = first.conflicts
    assert one.startswith("src/numbers.cpp:4: should be 'return 1;', but it is 'return 7;'")
    assert two.startswith("src/numbers.cpp:8: should be 'return 2;', but it is 'return 8;'")
    assert gone == "src/gone.cpp: the file to be changed is not there"
    assert tree.read("src/numbers.cpp") == other.replace("return 3", "return 30").encode()


def test_a_patch_and_a_hunk_that_upstream_has_are_recognised(tmp_path: Path, series: Series) -> None:
    larger = NUMBERS.replace("return 1", "return 10")
    first, second = trials(tmp_path, series, numbers=larger.replace("return 3", "return 30"))
    assert second == (IN_UPSTREAM, ())
    assert first[0] == CONFLICTS
    (conflict,) = first[1]
    assert conflict.startswith("src/numbers.cpp:2: upstream has this change already; should be 'return 1;'")


def archive_of(folder: Path, **files: str) -> Path:
    """A source archive of another version, with these contents of src/NAME.cpp."""
    ggml = "".join(f"set(GGML_VERSION_{part} {i})\n" for i, part in enumerate(("MAJOR", "MINOR", "PATCH"), 3))
    tree = PINNED | {f"src/{name}.cpp": text for name, text in files.items()}
    tree |= {"CMakeLists.txt": "", "ggml/CMakeLists.txt": ggml}
    members = {f"pkg-9.9/vendor/llama.cpp/{name}": text for name, text in tree.items()}
    tiny_llama.pack(folder / "pkg-9.9.tar.gz", members | {"pkg-9.9/llama_cpp/__init__.py": ""})
    return folder / "pkg-9.9.tar.gz"


COMMIT = "12" * 20


def test_the_pin_is_written_only_if_asked(
    tmp_path: Path, series: Series, capsys: pytest.CaptureFixture[str]
) -> None:
    pin_file = tmp_path / "upstream.toml"
    pin_file.write_text(before := PIN_FILE.read_text())
    archive = archive_of(tmp_path)
    assert move("9.9", archive, tmp_path / "work", series, False, None, pin_file) == 0
    assert "applies: 2" in capsys.readouterr().out
    assert pin_file.read_text() == before

    assert move("9.9", archive, tmp_path / "work", series, False, COMMIT, pin_file) == 0
    pin = load_pin(pin_file)
    assert (pin.version, pin.archive, pin.llama_cpp_commit) == ("9.9", archive.name, COMMIT)
    assert (pin.source_folder, pin.python_folder) == ("pkg-9.9/vendor/llama.cpp", "pkg-9.9/llama_cpp")
    assert pin.ggml_version == "3.4.5"
    tree = next(each for each in (tmp_path / "work").iterdir())
    assert pin.upstream_tree_sha256 == tree_hash(tree)
    patched = Tree(tree)
    series.apply(patched)
    assert pin.patched_tree_sha256 == patched.hash()
    assert pin_file.read_text().startswith(before.splitlines()[0])


def test_with_conflicts_the_hash_of_the_patched_tree_is_left_for_record(
    tmp_path: Path, series: Series, capsys: pytest.CaptureFixture[str]
) -> None:
    pin_file = tmp_path / "upstream.toml"
    pin_file.write_text(PIN_FILE.read_text())
    archive = archive_of(tmp_path, gone="int other();\n")
    assert move("9.9", archive, tmp_path / "work", series, False, COMMIT, pin_file) == 1
    out = capsys.readouterr().out
    assert "src/gone.cpp:1: should be 'int gone();', but it is 'int other();'" in out
    assert "tools/run patches record" in out
    assert load_pin(pin_file).version == "9.9"
    assert load_pin(pin_file).patched_tree_sha256 == load_pin().patched_tree_sha256


def test_an_archive_of_another_version_is_refused(
    tmp_path: Path, series: Series, capsys: pytest.CaptureFixture[str]
) -> None:
    pin_file = tmp_path / "upstream.toml"
    pin_file.write_text(before := PIN_FILE.read_text())
    archive = archive_of(tmp_path)
    with pytest.raises(PatchError, match=r"another version: expected the folder pkg-9\.8, found pkg-9\.9;"):
        move("9.8", archive, tmp_path / "work", series, False, COMMIT, pin_file)
    assert pin_file.read_text() == before
    words = ["--archive", str(archive), "--work", str(tmp_path / "work")]
    assert main(["9.8", *words, "--write", "--commit", COMMIT]) == 2
    assert "another version" in capsys.readouterr().err
