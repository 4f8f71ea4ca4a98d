"""`convert-kimi OWNER/NAME`: the same bytes as from the folder or one clear error, whatever the network does."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
from convert_tools import assert_refused, convert, edited_tensors, fresh_checkpoint, gguf_keys, start_convert
from hub_server import COMMIT, TOKEN, Answer, Asked, FakeHub, Fault, repository, serving, trickle
from random_checkpoint import Spec

from kimi_gguf.convert.output import unfinished
from kimi_gguf.convert.source import read_ahead, remote
from kimi_gguf.convert.source.hub import HubId

SPEC = Spec(layers="KKM", hidden=128, experts=16, seed=50)
DEMO, TINY = "kimi/demo", "org/Tiny-Kimi"
SHARD = "model-00002-of-00002.safetensors"
KEPT = {".x.gguf.unfinished"}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both checkpoints as a cache would have them on disk."""
    found = {}
    for name in (DEMO, TINY):
        root = tmp_path_factory.mktemp("cache") / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT
        if name == DEMO:
            demo = Path(__file__).parents[2] / "demo"
            shutil.copytree(demo, root)
        else:
            fresh_checkpoint(root, SPEC)
        found[name] = root
    return found


@pytest.fixture(scope="session")
def expected(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the folders give."""
    out = tmp_path_factory.mktemp("expected")
    for folder in folders.values():
        assert convert(folder, "-o", out / f"{folder.parts[-3]}.gguf").status == 0
    return {name: (out / f"{folder.parts[-3]}.gguf").read_bytes() for name, folder in folders.items()}


@pytest.fixture
def hub(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Servers with both, huggingface_hub pointed to them; a token, an empty cache, little patience."""
    files = {
        key: content for name, folder in folders.items() for key, content in repository(name, folder).items()
    }
    with serving(files) as servers:
        constants = huggingface_hub.constants
        template = servers.hub + constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", servers.hub)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(remote, "FIRST_PAUSE", 0.005)
        monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.05)
        monkeypatch.setattr(remote, "SILENT_SECONDS", 0.5)
        monkeypatch.setattr(remote, "SLOW_SECONDS", 0.2)
        yield servers


def from_cdn(change: Callable[[Answer], Answer | None], times: int = 1 << 30, after: int = 0) -> Fault:
    """`change` some of the content network's answers: so many, after so many that are left alone."""
    seen = 0

    def fault(asked: Asked, answer: Answer) -> Answer:
        nonlocal seen
        if asked.server != "cdn":
            return answer
        seen += 1
        return (change(answer) or answer) if after < seen <= after + times else answer

    return fault


def from_hub(pattern: str, change: Callable[[Answer], Answer | None], times: int = 1 << 30) -> Fault:
    """`change` the hub's answers to paths in which `pattern` is found."""
    seen = 0

    def fault(asked: Asked, answer: Answer) -> Answer:
        nonlocal seen
        if asked.server != "hub" or not re.search(pattern, asked.path):
            return answer
        seen += 1
        return (change(answer) or answer) if seen <= times else answer

    return fault


def dropped(answer: Answer) -> None:
    answer.length = len(answer.content)
    answer.content = answer.content[: len(answer.content) // 2]


def dropped_at_once(answer: Answer) -> None:
    answer.length = len(answer.content)
    answer.content = b""


def status(number: int, **headers: str) -> Callable[[Answer], Answer]:
    return lambda answer: Answer(number, {name.replace("_", "-"): value for name, value in headers.items()})


def silent(answer: Answer) -> None:
    def pace(content: bytes) -> Iterator[bytes]:
        yield content[:100]
        time.sleep(1)
        yield content[100:]

    answer.pace = pace


def trickling(answer: Answer) -> None:
    answer.pace = trickle(40, 0.02)


def header(name: str, value: str | None) -> Callable[[Answer], None]:
    def change(answer: Answer) -> None:
        answer.headers.pop(name, None)
        if value is not None:
            answer.headers[name] = value

    return change


def whole_file(answer: Answer) -> Answer:
    return Answer(200, answer.headers, answer.content * 3)


def too_short(answer: Answer) -> None:
    answer.content = answer.content[:-1]


@pytest.mark.parametrize("source", [DEMO, f"hf://{DEMO}", TINY, f"{TINY}@{COMMIT}", f"hf://{TINY}@main"])
def test_a_hub_id_gives_the_bytes_of_the_folder(
    hub: FakeHub, out: Path, expected: dict[str, bytes], source: str
) -> None:
    run = convert(source, "-o", out / "x.gguf")
    assert run.status == 0, run.err
    name = DEMO if DEMO in source else TINY
    assert (out / "x.gguf").read_bytes() == expected[name]
    keys = gguf_keys(out / "x.gguf")
    assert keys["general.source.huggingface.repository"] == name
    assert keys["kimi_gguf.source.commit"] == COMMIT and keys["general.name"] == name.split("/")[1]
    assert (
        "bytes of weights are streamed over the network" in run.err
        and "they are not stored on disk" in run.err
    )


PASSING = {
    "dropped midway": lambda: from_cdn(dropped, times=5, after=4),
    "dropped at once": lambda: from_cdn(dropped_at_once, times=4, after=3),
    "500": lambda: from_cdn(status(500), times=4, after=3),
    "503 with Retry-After": lambda: from_cdn(status(503, Retry_After="7"), times=4, after=3),
    "429 with a date": lambda: from_cdn(
        status(429, Retry_After="Wed, 21 Oct 2099 07:28:00 GMT"), times=4, after=3
    ),
    "silent": lambda: from_cdn(silent, times=2, after=3),
    "trickling": lambda: from_cdn(trickling, times=2, after=3),
    "location expired": lambda: from_cdn(status(403), times=1, after=3),
    "location gone": lambda: from_cdn(status(404), times=1, after=3),
    "hub's answer 500": lambda: from_hub("/api/models", status(500), times=2),
    "hub's shards 429": lambda: from_hub("safetensors$", status(429, Retry_After="1"), times=3),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_passes_is_outlasted(
    hub: FakeHub, out: Path, expected: dict[str, bytes], fault: Callable[[], Fault]
) -> None:
    hub.fault = fault()
    run = convert(TINY, "-o", out / "x.gguf")
    assert run.status == 0, run.err
    assert (out / "x.gguf").read_bytes() == expected[TINY]


def test_what_broke_off_goes_on_at_its_byte(hub: FakeHub, out: Path, expected: dict[str, bytes]) -> None:
    hub.fault = from_cdn(dropped, times=5, after=4)
    assert convert(DEMO, "-o", out / "x.gguf").status == 0
    assert (out / "x.gguf").read_bytes() == expected[DEMO]
    size = sum(len(c) for (name, file), c in hub.files.items() if name == DEMO and file.endswith("s"))
    assert hub.served() < size + 100_000, "bytes came twice"  # headers are read twice, by design


REFUSED = {
    "never a byte": (
        lambda: from_cdn(dropped_at_once, after=6),
        "gave up after 6 attempts",
        "--resume",
        SHARD[:5],
    ),
    "always 500": (lambda: from_cdn(status(500), after=6), "answers 500", "gave up after 6 attempts"),
    "always 403": (lambda: from_cdn(status(403), after=6), "answers 403", "gave up after 6 attempts"),
    "no ranges": (lambda: from_cdn(whole_file, after=6), "expected status 206, found 200"),
    "range not satisfiable": (lambda: from_cdn(status(416), after=6), "expected status 206, found 416"),
    "no Content-Range": (
        lambda: from_cdn(header("Content-Range", None), after=6),
        "Content-Range: expected 'bytes ",
    ),
    "another range": (
        lambda: from_cdn(header("Content-Range", "bytes 0-9/10"), after=6),
        "found 'bytes 0-9/10'",
    ),
    "a range of stars": (
        lambda: from_cdn(header("Content-Range", "bytes */*"), after=6),
        "found 'bytes */*'",
    ),
    "numbers of a million digits": (
        lambda: from_cdn(header("Content-Range", f"bytes {'9' * 9000}-1/2"), after=6),
        "found 'bytes 999",
    ),
    "shorter than the range": (lambda: from_cdn(too_short, after=6), "Content-Length: expected"),
    "compressed": (
        lambda: from_cdn(header("Content-Encoding", "gzip"), after=6),
        "Content-Encoding: expected none",
    ),
    "another file midway": (
        lambda: from_cdn(header("ETag", '"x"'), after=6),
        "was changed while it was read (ETag",
    ),
    "redirects without end": (
        lambda: from_cdn(status(302, Location="/org/Tiny-Kimi/" + SHARD), after=6),
        "more than 5 redirects",
    ),
    "a redirect to another protocol": (
        lambda: from_cdn(status(302, Location="ftp://elsewhere/x"), after=6),
        "redirects to 'ftp://elsewhere/x'",
    ),
    "a redirect to nowhere": (
        lambda: from_cdn(status(302, Location="http://[::bad"), after=6),
        "redirects to",
    ),
}


@pytest.mark.parametrize("fault, words", [(f, w) for f, *w in REFUSED.values()], ids=REFUSED)
def test_what_is_wrong_is_refused_by_name(
    hub: FakeHub, out: Path, fault: Callable[[], Fault], words: list[str]
) -> None:
    hub.fault = fault()
    assert_refused(
        convert(TINY, "-o", out / "x.gguf", "--quiet"), out, f"hf://{TINY}@{COMMIT[:12]}/model-0000", *words
    )


def changed(**headers: str) -> Fault:
    """After the shards were opened a connection breaks, and the hub says something else of the file."""
    broken = from_cdn(dropped_at_once, times=1, after=6)
    heads = 0

    def fault(asked: Asked, answer: Answer) -> Answer:
        nonlocal heads
        if asked.method == "HEAD" and asked.path.endswith(".safetensors"):
            heads += 1
            if heads > 2:
                answer.headers |= {name.replace("_", "-"): value for name, value in headers.items()}
        return broken(asked, answer)

    return fault


@pytest.mark.parametrize(
    "headers",
    [{"X_Repo_Commit": "f" * 40}, {"X_Linked_ETag": '"other"'}, {"X_Linked_Size": "12345"}],
    ids=str,
)
def test_a_file_that_changes_midway_is_noticed(hub: FakeHub, out: Path, headers: dict[str, str]) -> None:
    hub.fault = changed(**headers)
    run = convert(TINY, "-o", out / "x.gguf", "--quiet")
    assert_refused(run, out, f"hf://{TINY}@", ".safetensors", "was changed while it was read")


ANSWERS = {
    "gated": (lambda: from_hub("/api", status(403, X_Error_Code="GatedRepo")), "is gated", "HF_TOKEN"),
    "unauthorised": (lambda: from_hub("/api", status(401)), "HF_TOKEN"),
    "forbidden": (lambda: from_hub("/api", status(403)), "answers 403", "HF_TOKEN"),
    "gated files": (
        lambda: from_hub("/resolve", status(403, X_Error_Code="GatedRepo")),
        "is gated",
        "config.json",
    ),
    "gated shards": (
        lambda: from_hub("safetensors$", status(403, X_Error_Code="GatedRepo")),
        "is gated",
        ".safetensors",
    ),
    "no JSON": (lambda: from_hub("/api", lambda a: Answer(200, {}, b"<html>")), "does not read"),
    "JSON of something else": (lambda: from_hub("/api", lambda a: Answer(200, {}, b"[]")), "does not read"),
    "no commit": (
        lambda: from_hub("/api", lambda a: Answer(200, {}, b'{"id": "a/b", "siblings": []}')),
        "the commit ''",
    ),
    "always 500": (lambda: from_hub("/api", status(500)), "answers 500", "gave up after 6 attempts"),
    "redirects without end": (
        lambda: from_hub("/api", status(302, Location="/api/models")),
        "TooManyRedirects",
    ),
}


@pytest.mark.parametrize("fault, words", [(f, w) for f, *w in ANSWERS.values()], ids=ANSWERS)
def test_what_the_hub_refuses_is_said(
    hub: FakeHub, out: Path, fault: Callable[[], Fault], words: list[str]
) -> None:
    hub.fault = fault()
    assert_refused(convert(TINY, "-o", out / "x.gguf"), out, f"hf://{TINY}@", *words)


@pytest.mark.parametrize(
    "source, words",
    [
        ("org/nothing", ["has no such repository", "no such folder is here"]),
        (f"{TINY}@nothing", ["has no such revision"]),
        (f"{TINY}@{'1' * 40}", ["has no such revision"]),
        ("nothing", ["not found; expected a checkpoint folder", "OWNER/NAME"]),
        ("models/model.safetensors", ["not found; expected a checkpoint folder"]),
        ("../Tiny-Kimi", ["not found; expected"]),
        ("hf://Tiny-Kimi", ["not found; expected"]),
        ("a\0b/c", ["not found; expected"]),
        ("x" * 5000, ["not found; expected"]),
    ],
)
def test_what_is_nothing_is_refused(hub: FakeHub, out: Path, source: str, words: list[str]) -> None:
    assert_refused(convert(source, "-o", out / "x.gguf"), out, *words)


def test_a_folder_of_that_name_is_the_folder(
    hub: FakeHub, out: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out.parent)
    shutil.copytree(folders[TINY], TINY)
    assert convert(TINY, "-o", out / "x.gguf").status == 0
    assert hub.asked == []


def test_a_shard_that_the_hub_lacks_is_named(hub: FakeHub, out: Path) -> None:
    del hub.files[TINY, SHARD]
    assert_refused(convert(TINY, "-o", out / "x.gguf"), out, f"hf://{TINY}@{COMMIT[:12]}/{SHARD}: not found")


def test_pickled_weights_are_refused(hub: FakeHub, out: Path) -> None:
    for name in ("model.safetensors.index.json", SHARD, SHARD.replace("2-", "1-")):
        del hub.files[TINY, name]
    hub.files[TINY, "pytorch_model.bin"] = b""
    assert_refused(convert(TINY, "-o", out / "x.gguf"), out, "pytorch_model.bin", "pickled weights run code")


def test_large_small_files_are_refused(hub: FakeHub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_gguf.convert.source.hub.MAX_BYTES", 1000)
    assert_refused(convert(TINY, "-o", out / "x.gguf"), out, "expected a small file, found")


def test_a_header_is_checked_as_on_disk(hub: FakeHub, out: Path) -> None:
    content = hub.files[TINY, SHARD]
    hub.files[TINY, SHARD] = content + b"\0"
    assert_refused(
        convert(TINY, "-o", out / "x.gguf"), out, f"hf://{TINY}@", f"{SHARD}: expected {len(content)} bytes"
    )


def test_values_are_checked_as_on_disk(
    hub: FakeHub, out: Path, tmp_path: Path, folders: dict[str, Path]
) -> None:
    copy = tmp_path / SHARD
    copy.write_bytes(hub.files[TINY, SHARD])
    with edited_tensors(copy) as tensors:
        name, (dtype, shape, content) = next((n, t) for n, t in tensors.items() if t[0] == "BF16")
        tensors[name] = dtype, shape, b"\xc0\x7f" + content[2:]
    hub.files[TINY, SHARD] = copy.read_bytes()
    run = convert(TINY, "-o", out / "x.gguf", "--quiet")
    assert_refused(run, out, f"hf://{TINY}@{COMMIT[:12]}/{SHARD}: {name!r}: element [0", "is nan")


@pytest.mark.parametrize("hops", [0, 1, 5])
def test_the_token_is_for_the_hub_alone(
    hub: FakeHub, out: Path, expected: dict[str, bytes], hops: int
) -> None:
    """Also where the content network sends the reader on, or back."""

    def fault(asked: Asked, answer: Answer) -> Answer:
        hop = int(asked.path.partition("?")[2] or 0) if asked.server == "cdn" else hops
        return answer if hop == hops else Answer(307, {"Location": f"{asked.path.split('?')[0]}?{hop + 1}"})

    hub.fault = fault
    assert convert(TINY, "-o", out / "x.gguf").status == 0
    assert (out / "x.gguf").read_bytes() == expected[TINY]
    asked = [a for a in hub.asked if a.server == "cdn"]
    assert asked and not [a for a in asked if TOKEN in str(a.headers) or "authorization" in a.headers]
    asked = [a for a in hub.asked if a.server == "hub" and TINY in a.path]
    assert asked and all(a.headers["authorization"] == f"Bearer {TOKEN}" for a in asked)


def test_files_that_the_hub_itself_serves_are_read_with_the_token(
    hub: FakeHub, out: Path, expected: dict[str, bytes]
) -> None:
    hub.large = lambda name: False
    assert convert(TINY, "-o", out / "x.gguf").status == 0
    assert (out / "x.gguf").read_bytes() == expected[TINY]
    ranged = [a for a in hub.asked if "range" in a.headers]
    assert ranged and all(a.headers["authorization"] == f"Bearer {TOKEN}" for a in ranged)


def header_bytes(hub: FakeHub, name: str) -> int:
    shards = [c for (owner, file), c in hub.files.items() if owner == name and file.endswith(".safetensors")]
    return sum(8 + int.from_bytes(content[:8], "little") for content in shards)


def test_a_plan_reads_headers_only(hub: FakeHub, folders: dict[str, Path]) -> None:
    run = convert(DEMO, "--dry-run")
    assert run.status == 0 and hub.served() == header_bytes(hub, DEMO)
    local = convert(folders[DEMO], "--dry-run").out.splitlines()
    assert [line for line in run.out.splitlines() if "network" not in line] == local


def test_inspect_reads_headers_only(hub: FakeHub, folders: dict[str, Path]) -> None:
    run = convert("inspect", DEMO)
    assert run.status == 0 and hub.served() == header_bytes(hub, DEMO)
    assert run.out.split(":", 1)[1] == convert("inspect", folders[DEMO]).out.split(":", 1)[1]


def test_verify_proves_against_the_hub(hub: FakeHub, out: Path, expected: dict[str, bytes]) -> None:
    (out / "x.gguf").write_bytes(expected[TINY])
    assert convert("verify", out / "x.gguf", "--checkpoint", f"hf://{TINY}").status == 0
    (out / "x.gguf").write_bytes(expected[TINY][:-40] + b"\1" * 40)
    assert convert("verify", out / "x.gguf", "--checkpoint", f"hf://{TINY}").status == 1


def test_no_shard_ever_lies_on_disk(hub: FakeHub, out: Path, tmp_path: Path) -> None:
    found: set[Path] = set()

    def look(asked: Asked, answer: Answer) -> Answer:
        large = (f for f in tmp_path.rglob("*") if f.is_file() and f.stat().st_size > 100_000)
        found.update(file.parent for file in large)
        return answer

    hub.fault = look
    assert convert(DEMO, "-o", out / "x.gguf").status == 0
    assert found <= {out / ".x.gguf.unfinished"}  # the output itself
    cache = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if not file.is_symlink())
    assert cache < 100_000


def test_small_files_are_asked_for_once(hub: FakeHub) -> None:
    assert convert(TINY, "--dry-run").status == 0
    hub.asked.clear()
    assert convert(TINY, "--dry-run").status == 0
    assert not [a.path for a in hub.asked if a.path.endswith(("json", "model"))]


def test_a_shard_that_the_cache_has_is_read_there(
    hub: FakeHub, out: Path, expected: dict[str, bytes]
) -> None:
    huggingface_hub.hf_hub_download(TINY, SHARD, revision=COMMIT, endpoint=hub.hub)
    hub.asked.clear()
    assert convert(TINY, "-o", out / "x.gguf").status == 0
    assert (out / "x.gguf").read_bytes() == expected[TINY] and hub.served(suffix=SHARD) == 0


def test_after_a_lost_connection_resume_goes_on(
    hub: FakeHub, out: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "SYNC_SECONDS", 0)
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", 1 << 16)
    hub.fault = from_cdn(dropped_at_once, after=60)
    run = convert(DEMO, "-o", out / "x.gguf", "--quiet")
    assert run.status == 1 and "continue with --resume" in run.err and len(run.err.splitlines()) == 1
    assert {file.name for file in out.iterdir()} == KEPT
    hub.fault = lambda asked, answer: answer
    before = hub.served()
    assert convert(DEMO, "-o", out / "x.gguf", "--resume").status == 0
    assert (out / "x.gguf").read_bytes() == expected[DEMO]
    whole = sum(
        len(content)
        for (name, file), content in hub.files.items()
        if name == DEMO and file.endswith(".safetensors")
    )
    assert hub.served() - before < whole, "it began anew"


def test_resume_at_another_commit_is_refused(
    hub: FakeHub, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "SYNC_SECONDS", 0)
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", 1 << 16)
    hub.fault = from_cdn(dropped_at_once, after=60)
    assert convert(DEMO, "-o", out / "x.gguf", "--quiet").status == 1
    hub.fault = lambda asked, answer: answer
    hub.commit = "f" * 40
    run = convert(DEMO, "-o", out / "x.gguf", "--resume")
    assert run.status == 1 and "is of another checkpoint" in run.err
    assert {file.name for file in out.iterdir()} == KEPT


def set_environment(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, tmp_path: Path) -> None:
    """For a process of its own."""
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    for name, value in (("ENDPOINT", hub.hub), ("HOME", str(tmp_path / "home")), ("TOKEN", TOKEN)):
        monkeypatch.setenv(f"HF_{name}", value)


def test_the_variables_of_huggingface_hub_are_heeded(
    hub: FakeHub, out: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(output: str) -> tuple[str, int]:
        process = start_convert(TINY, "-o", out / output)
        return process.communicate(timeout=120)[1], process.returncode

    set_environment(monkeypatch, hub, tmp_path)
    err, code = run("a.gguf")
    assert code == 0 and (out / "a.gguf").read_bytes() == expected[TINY], err
    assert (tmp_path / "home" / "hub").is_dir()
    hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for home in ("home", "empty"):
        monkeypatch.setenv("HF_HOME", str(tmp_path / home))
        err, code = run("b.gguf")
        assert code == 1 and hub.asked == [] and "Traceback" not in err, err
    assert "HF_HUB_OFFLINE forbids to ask the hub" in err


def test_without_huggingface_hub_it_says_how_to_get_it(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_refused(convert(TINY, "-o", out / "x.gguf"), out, "pip install 'kimi-gguf[hub]'")


def test_an_interrupt_ends_it_while_the_link_is_silent(
    hub: FakeHub, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, hub, tmp_path)
    waiting = threading.Event()

    def fault(asked: Asked, answer: Answer) -> Answer:
        if asked.server == "cdn" and len([a for a in hub.asked if a.server == "cdn"]) > 6:

            def pace(content: bytes) -> Iterator[bytes]:
                yield content[:1]
                waiting.set()
                time.sleep(8)

            answer.pace = pace
        return answer

    hub.fault = fault
    process = start_convert(TINY, "-o", out / "x.gguf", "--quiet")
    assert waiting.wait(60)
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(2)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err, err
    assert time.monotonic() - began < 6 and list(out.iterdir()) == []


@pytest.mark.parametrize(
    "text, found",
    [
        ("a/b", HubId("a/b")),
        ("hf://a/b@refs/pr/1", HubId("a/b", "refs/pr/1")),
        ("a/b@v1.0", HubId("a/b", "v1.0")),
        ("a/b.json", None),
        ("hf://a/b.json", HubId("a/b.json")),
        ("a/b/c", None),
        ("/a/b", None),
        ("a/b@", None),
        ("a/..", None),
        ("hf:/a/b", None),
    ],
)
def test_ids(text: str, found: HubId | None) -> None:
    assert HubId.parse(text) == found


@pytest.mark.parametrize(
    "text, seconds",
    [("", 0), ("7", 7), ("999999999", 120), ("-5", 0), ("soon", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)],
)
def test_retry_after(text: str, seconds: float) -> None:
    assert remote.retry_after(text) == seconds
