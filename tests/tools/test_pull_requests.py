"""Each fix is a commit on the pinned llama.cpp alone; its test for upstream fails without it and passes with it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import tiny_llama

from kimi_gguf.engine.builds import upstream_source
from kimi_gguf.patches.errors import PatchError
from kimi_gguf.patches.export import write_folder
from kimi_gguf.patches.series import FIXES, Series, load_series
from kimi_gguf.patches.tree import Tree
from kimi_gguf.tools.patch_index import UPSTREAM_PAGE, upstream_page
from kimi_gguf.tools.pull_request import (
    PullRequest,
    folder_files,
    load_pull_requests,
    select,
)
from kimi_gguf.tools.pull_requests import main
from kimi_gguf.tools.upstream_tests import IN_UPSTREAM, NEEDED, OTHER, Outcome, prove, without_fix

REQUESTS = load_pull_requests(load_series())
TESTED = [request for request in REQUESTS if request.test]
TEST = """Target: test-answer
Run: test-answer --all
Fails: answer 1
Shows: The test asks
  for the answer.

diff --git a/tests/test-answer.cpp b/tests/test-answer.cpp
--- a/tests/test-answer.cpp
+++ b/tests/test-answer.cpp
@@ -1 +1 @@
-int main() {}
+int main() { return 1; }
"""


def git(checkout: Path, *words: str | Path) -> str:
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *words]
    return subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True).stdout


@pytest.mark.engine
def test_each_pull_request_is_applied_by_git_am_to_the_pinned_llama_cpp_alone(tmp_path: Path) -> None:
    source = upstream_source() / "llama.cpp"
    checkout = tmp_path / "llama.cpp"
    Tree(source).write_to(checkout)
    git(checkout, "init", "-q")
    git(checkout, "add", "-Af", ".")
    git(checkout, "commit", "-q", "-m", "pin")
    write_folder(tmp_path / "out", folder_files(REQUESTS))
    for request in REQUESTS:
        before = [tmp_path / "out" / f"{each.name}.patch" for each in request.needs]
        git(checkout, "am", "-q", *before, tmp_path / "out" / f"{request.name}.patch")
        assert git(checkout, "log", "-1", "--format=%s").strip() == request.title
        assert int(git(checkout, "rev-list", "--count", "HEAD")) == 2 + len(before)
        changed = git(checkout, "diff", "--name-only", "HEAD^").split()
        has_test = any("tests" in name.split("/") for name in changed)
        assert has_test == (request.test is not None), request.name
        git(checkout, "reset", "-q", "--hard", f"HEAD~{1 + len(before)}")


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("upstream-tests")


@pytest.mark.full
@pytest.mark.engine
@pytest.mark.parametrize("request_", TESTED, ids=lambda request: request.name)
def test_its_test_fails_without_the_fix_and_passes_with_it(request_: PullRequest, work: Path) -> None:
    assert prove(request_, upstream_source() / "llama.cpp", work) is None


def test_the_page_lists_all() -> None:
    page = UPSTREAM_PAGE.read_text(encoding="utf-8")
    assert page == upstream_page(load_series(), page), "run: tools/run patches index"
    reasons = page.partition("Fixes without a test for upstream")[2].partition("\n\n`tools")[0]
    named = {number for row in re.findall(r"(?m)^\| ([\d, ]+) \|", reasons) for number in row.split(", ")}
    assert named == {request.name[:4] for request in REQUESTS if request.test is None}


def tiny_request(folder: Path, test: str = TEST) -> tuple[Series, PullRequest]:
    """The pull request of the miniature's fix."""
    series = tiny_llama.make(folder).series
    (folder / "tree/tests").mkdir()
    (folder / "tree/tests/test-answer.cpp").write_text("int main() {}\n")
    (folder / "series/fixes/0001-answer.pr").write_text(test)
    (request,) = load_pull_requests(series, folder / "series" / FIXES)
    return series, request


def test_the_commit_contains_fix_sources_and_test(tmp_path: Path) -> None:
    _, request = tiny_request(tmp_path)
    commit = request.commit.decode()
    assert "Subject: [PATCH] tiny : answer two\n" in commit
    assert "\nTwo is the better answer.\n\n---\n" in commit
    assert re.findall(r"(?m)^\+\+\+ b/(.*)", commit) == [
        "src/kimi.h",
        "src/answer.cpp",
        "tests/test-answer.cpp",
    ]
    tree = Tree(tmp_path / "tree")
    request.apply(tree, fix=False)
    assert list(tree.changed()) == ["tests/test-answer.cpp"]
    assert "The test asks for the answer." in request.notes()


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("Fails: answer 1\n", "", "no Fails"),
        (
            "--- a/tests/test-answer.cpp\n+++ b/tests/test-answer.cpp\n@@ -1 +1 @@\n-int main() {}\n",
            "new file mode 100644\n--- /dev/null\n+++ b/tests/test-answer.cpp\n@@ -0,0 +1 @@\n",
            "changes of tests/test-answer.cpp",
        ),
    ],
    ids=["without a field", "new file"],
)
def test_a_malformed_test_is_refused_by_name(tmp_path: Path, old: str, new: str, found: str) -> None:
    assert old in TEST
    with pytest.raises(PatchError, match=rf"0001-answer\.pr.*{found}"):
        tiny_request(tmp_path, TEST.replace(old, new))


@pytest.mark.parametrize(
    ("outcomes", "verdict", "problem"),
    [
        ([Outcome(False, "answer 1"), Outcome(True, "")], NEEDED, None),
        ([Outcome(False, "answer 1"), Outcome(False, "answer 3")], NEEDED, "the test fails with the fix"),
        ([Outcome(True, "")], IN_UPSTREAM, IN_UPSTREAM),
        ([Outcome(False, "answer 5")], OTHER, "does not print 'answer 1'"),
    ],
    ids=["proven", "fails with the fix", "passes without the fix", "fails for another reason"],
)
def test_only_a_test_that_fails_for_its_reason_without_the_fix_is_a_proof(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outcomes: list[Outcome],
    verdict: str,
    problem: str | None,
) -> None:
    _, request = tiny_request(tmp_path)
    built: list[bool] = []

    def run(tree: Tree, target: str, run: str, work: Path) -> Outcome:
        assert (target, run) == ("test-answer", "test-answer --all")
        built.append(tree.read("src/kimi.h") is not None)
        return outcomes[len(built) - 1]

    monkeypatch.setattr("kimi_gguf.tools.upstream_tests.run_test", run)
    assert without_fix(request, tmp_path / "tree", tmp_path)[0] == verdict
    built.clear()
    found = prove(request, tmp_path / "tree", tmp_path)
    assert (problem is None and found is None) or (problem and problem in (found or ""))
    assert built == [False, True][: len(outcomes)]


def test_pull_requests_are_chosen_by_number() -> None:
    assert select(REQUESTS, []) == REQUESTS
    assert [request.name[:4] for request in select(REQUESTS, ["7", "0001"])] == ["0007", "0001"]
    for wrong in ("0", "99", "x"):
        with pytest.raises(PatchError, match=f"no fix has the number {wrong}"):
            select(REQUESTS, [wrong])


def test_the_command_writes_the_files_and_refuses_a_folder_with_files(tmp_path: Path) -> None:
    assert main([str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 2 * len(REQUESTS)
    assert main([str(tmp_path / "out")]) == 1
    with pytest.raises(SystemExit):
        main([])
