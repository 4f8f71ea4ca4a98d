"""`convert-kimi OWNER/NAME`: the same bytes as from the folder, or one clear error, for any network fault."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
from convert_tools import (
    Run,
    assert_refused,
    convert,
    edited_tensors,
    fresh_checkpoint,
    gguf_keys,
    start_convert,
)
from hub_server import COMMIT, TOKEN, Answer, Asked, FakeHub, Fault, repository, serving, trickle
from random_checkpoint import Spec
from random_k3 import K3Spec
from random_k3 import write_checkpoint as write_k3
from test_convert_forms import FORMS, write

from kimi_gguf.convert.output import stream, unfinished
from kimi_gguf.convert.source import read_ahead, remote
from kimi_gguf.convert.source.hub import HubId

SPEC = Spec(layers="KM", hidden=128, experts=8, seed=50)
DEMO, TINY, K3 = "kimi/demo", "org/Tiny-Kimi", "org/Tiny-K3"
QUANTIZED = ("org/fp8-blocks", "org/int4-zeros", "org/nvfp4")
K3_SPEC = K3Spec(layers="KM", experts=6, latent=256, moe_intermediate=8192)  # experts of 1.1 MB
SHARD = "model-00002-of-00002.safetensors"
KEPT = {".x.gguf.unfinished"}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both checkpoints in the layout of a cache on disk."""
    cache = tmp_path_factory.mktemp("cache")
    paths = {
        name: f"models--{name.replace('/', '--')}/snapshots/{COMMIT}" for name in (DEMO, TINY, K3, *QUANTIZED)
    }
    found = {name: cache / path for name, path in paths.items()}
    shutil.copytree(Path(__file__).parents[2] / "demo", found[DEMO])
    fresh_checkpoint(found[TINY], SPEC)
    write_k3(found[K3], K3_SPEC, shards=2)
    for name in QUANTIZED:
        quantized, _ = write(tmp_path_factory.mktemp("form"), FORMS[name.removeprefix("org/")], "kimi")
        shutil.copytree(quantized, found[name])
    return found


@pytest.fixture(scope="session")
def expected(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The output for the folders."""
    out = tmp_path_factory.mktemp("expected")
    for folder in folders.values():
        assert convert(folder, "-o", out / f"{folder.parts[-3]}.gguf").status == 0
    return {name: (out / f"{folder.parts[-3]}.gguf").read_bytes() for name, folder in folders.items()}


@pytest.fixture
def hub(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Servers with both, configured for huggingface_hub; a token, an empty cache, short timeouts."""
    files: dict[tuple[str, str], bytes] = {}
    for name, folder in folders.items():
        files |= repository(name, folder)
    with serving(files) as servers:
        constants = huggingface_hub.constants
        template = servers.hub + constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", servers.hub)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        pauses = {"FIRST_PAUSE": 0.005, "LONGEST_PAUSE": 0.05, "SILENT_SECONDS": 0.5, "SLOW_SECONDS": 0.2}
        for name, seconds in pauses.items():
            monkeypatch.setattr(remote, name, seconds)
        yield servers


Change = Callable[[Answer], Answer | None]


def faulty(server: str, change: Change, times: int = 1 << 30, after: int = 0, path: str = "") -> Fault:
    """`change` a number of a server's answers for paths that match `path`, after a number of unchanged ones."""
    seen = 0

    def fault(asked: Asked, answer: Answer) -> Answer:
        nonlocal seen
        if asked.server != server or not re.search(path, asked.path):
            return answer
        seen += 1
        return (change(answer) or answer) if after < seen <= after + times else answer

    return fault


from_cdn = partial(faulty, "cdn")


def dropped(answer: Answer, divisor: int = 2) -> None:
    """The connection ends after a part of the content."""
    answer.length = len(answer.content)
    answer.content = answer.content[: len(answer.content) // divisor]


def dropped_at_once(answer: Answer) -> None:
    dropped(answer, 1 << 60)


def status(number: int, **headers: str) -> Change:
    return lambda answer: Answer(number, {name.replace("_", "-"): value for name, value in headers.items()})


def silent(answer: Answer) -> None:
    def pace(content: bytes) -> Iterator[bytes]:
        yield content[:100]
        time.sleep(1)
        yield content[100:]

    answer.pace = pace


def trickling(answer: Answer) -> None:
    answer.pace = trickle(40, 0.02)


def header(name: str, value: str | None) -> Change:
    def change(answer: Answer) -> None:
        answer.headers.pop(name, None)
        if value is not None:
            answer.headers[name] = value

    return change


def whole_file(answer: Answer) -> Answer:
    return Answer(200, answer.headers, answer.content * 3)


def too_short(answer: Answer) -> None:
    answer.content = answer.content[:-1]


def assert_converts(source: str, out: Path, expected: dict[str, bytes], *options: str) -> Run:
    """The conversion succeeds with the bytes of the folder."""
    run = convert(source, "-o", out / "x.gguf", *options)
    assert run.status == 0, run.err
    wanted = next(data for name, data in expected.items() if name in source)
    assert (out / "x.gguf").read_bytes() == wanted
    return run


@pytest.mark.parametrize("source", [DEMO, f"hf://{DEMO}", TINY, f"{TINY}@{COMMIT}", f"hf://{TINY}@main"])
def test_a_hub_id_gives_the_bytes_of_the_folder(
    hub: FakeHub, out: Path, expected: dict[str, bytes], source: str
) -> None:
    run = assert_converts(source, out, expected)
    name = DEMO if DEMO in source else TINY
    keys = gguf_keys(out / "x.gguf")
    assert keys["general.source.huggingface.repository"] == name
    assert keys["kimi_gguf.source.commit"] == COMMIT and keys["general.name"] == name.split("/")[1]
    assert "bytes of weights are streamed over the network; they are not stored on disk" in run.err


def test_packed_experts_are_fetched_whole(hub: FakeHub, out: Path, expected: dict[str, bytes]) -> None:
    """The elements of an expert and its scales, which are read alternately, are fetched with one request."""
    assert_converts(K3, out, expected)
    ranges = [asked.headers.get("Range") or asked.headers.get("range") for asked in hub.asked]
    sizes = [
        int(end) - int(begin) + 1 for begin, end in (re.findall(r"\d+", each) for each in ranges if each)
    ]
    expert = 256 * 8192 // 32 * 17
    shared = 3  # matrices of the shared experts are larger
    assert sum(size >= expert for size in sizes) == 3 * K3_SPEC.experts + shared
    assert sum(1000 < size < expert for size in sizes) < 40


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_are_fetched_once(
    name: str, hub: FakeHub, out: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of some rows, of which several share a row of scales. What is read is what was announced: any other
    range would make all that is announced come at once."""
    take, missed = read_ahead.ReadAhead.take, []

    def recorded(ahead: Any, *wanted: Any) -> Any:
        content = take(ahead, *wanted)
        if content is None and ahead._pool is not None:
            missed.append(wanted)
        return content

    monkeypatch.setattr(stream, "CHUNK_ELEMENTS", 1 << 13)
    monkeypatch.setattr(read_ahead.ReadAhead, "take", recorded)
    assert_converts(name, out, expected)
    assert not missed
    assert hub.served() < 1.25 * weight_bytes(hub, name) + 100_000


# (server, change, number of changed answers, number of unchanged ones before them, paths)
DATE = "Wed, 21 Oct 2099 07:28:00 GMT"
PASSING: dict[str, tuple[str, Change, int, int, str]] = {
    "dropped midway": ("cdn", dropped, 5, 4, ""),
    "dropped at once": ("cdn", dropped_at_once, 4, 3, ""),
    "500": ("cdn", status(500), 4, 3, ""),
    "503 with Retry-After": ("cdn", status(503, Retry_After="7"), 4, 3, ""),
    "429 with a date": ("cdn", status(429, Retry_After=DATE), 4, 3, ""),
    "silent": ("cdn", silent, 2, 3, ""),
    "trickling": ("cdn", trickling, 2, 3, ""),
    "location expired": ("cdn", status(403), 1, 3, ""),
    "location gone": ("cdn", status(404), 1, 3, ""),
    "hub's answer 500": ("hub", status(500), 2, 0, "/api/models"),
    "hub's shards 429": ("hub", status(429, Retry_After="1"), 3, 0, "safetensors$"),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_passing_faults_are_survived(
    hub: FakeHub, out: Path, expected: dict[str, bytes], fault: tuple[str, Change, int, int, str]
) -> None:
    hub.fault = faulty(*fault)
    assert_converts(TINY, out, expected)


def test_a_broken_transfer_continues_at_its_byte(hub: FakeHub, out: Path, expected: dict[str, bytes]) -> None:
    hub.fault = from_cdn(dropped, times=5, after=4)
    assert_converts(DEMO, out, expected)
    # Headers are read twice, by design.
    assert hub.served() < weight_bytes(hub, DEMO) + 100_000, "bytes came twice"


REFUSED: dict[str, tuple[Change, *tuple[str, ...]]] = {
    "never a byte": (dropped_at_once, "gave up after 6 attempts", "--resume", SHARD[:5]),
    "always 500": (status(500), "answers 500", "gave up after 6 attempts"),
    "always 403": (status(403), "answers 403", "gave up after 6 attempts"),
    "no ranges": (whole_file, "expected status 206, found 200"),
    "range not satisfiable": (status(416), "expected status 206, found 416"),
    "no Content-Range": (header("Content-Range", None), "Content-Range: expected 'bytes "),
    "another range": (header("Content-Range", "bytes 0-9/10"), "found 'bytes 0-9/10'"),
    "a range of stars": (header("Content-Range", "bytes */*"), "found 'bytes */*'"),
    "numbers of a million digits": (header("Content-Range", f"bytes {'9' * 9000}-1/2"), "found 'bytes 999"),
    "shorter than the range": (too_short, "Content-Length: expected"),
    "compressed": (header("Content-Encoding", "gzip"), "Content-Encoding: expected none"),
    "another file midway": (header("ETag", '"x"'), "was changed while it was read (ETag"),
    "redirects without end": (status(302, Location="/org/Tiny-Kimi/" + SHARD), "at most 5 redirects"),
    "a redirect to another protocol": (status(302, Location="ftp://x/y"), "redirects to 'ftp://x/y'"),
    "a redirect to nowhere": (status(302, Location="http://[::bad"), "redirects to"),
}


@pytest.mark.parametrize("change, words", [(c, w) for c, *w in REFUSED.values()], ids=REFUSED)
def test_wrong_answers_are_refused_by_name(hub: FakeHub, out: Path, change: Change, words: list[str]) -> None:
    hub.fault = from_cdn(change, after=6)
    run = convert(TINY, "-o", out / "x.gguf", "--quiet")
    assert_refused(run, out, f"hf://{TINY}@{COMMIT[:12]}/model-0000", *words)


def changed(**headers: str) -> Fault:
    """After the shards were opened a connection breaks, and the hub reports a different file."""
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


def content(text: bytes) -> Change:
    return lambda answer: Answer(200, {}, text)


GATED = status(403, X_Error_Code="GatedRepo")
ANSWERS: dict[str, tuple[str, Change, *tuple[str, ...]]] = {
    "gated": ("/api", GATED, "is gated", "HF_TOKEN"),
    "unauthorised": ("/api", status(401), "HF_TOKEN"),
    "forbidden": ("/api", status(403), "answers 403", "HF_TOKEN"),
    "gated files": ("/resolve", GATED, "is gated", "config.json"),
    "gated shards": ("safetensors$", GATED, "is gated", ".safetensors"),
    "no JSON": ("/api", content(b"<html>"), "cannot read the answer"),
    "JSON of something else": ("/api", content(b"[]"), "cannot read the answer"),
    "no commit": ("/api", content(b'{"id": "a/b", "siblings": []}'), "found ''"),
    "always 500": ("/api", status(500), "answers 500", "gave up after 6 attempts"),
    "redirects without end": ("/api", status(302, Location="/api/models"), "TooManyRedirects"),
}


@pytest.mark.parametrize("path, change, words", [(p, c, w) for p, c, *w in ANSWERS.values()], ids=ANSWERS)
def test_refusals_of_the_hub_are_reported(
    hub: FakeHub, out: Path, path: str, change: Change, words: list[str]
) -> None:
    hub.fault = faulty("hub", change, path=path)
    assert_refused(convert(TINY, "-o", out / "x.gguf"), out, f"hf://{TINY}@", *words)


@pytest.mark.parametrize(
    "source, words",
    [
        ("org/nothing", ["has no such repository", "no such folder"]),
        (f"{TINY}@nothing", ["no such revision"]),
        (f"{TINY}@{'1' * 40}", ["no such revision"]),
        ("nothing", ["not found; expected a checkpoint folder", "OWNER/NAME"]),
        ("models/model.safetensors", ["not found; expected a checkpoint folder"]),
        ("../Tiny-Kimi", ["not found; expected"]),
        ("hf://Tiny-Kimi", ["not found; expected"]),
        ("a\0b/c", ["not found; expected"]),
        ("x" * 5000, ["not found; expected"]),
    ],
)
def test_an_invalid_source_is_refused(hub: FakeHub, out: Path, source: str, words: list[str]) -> None:
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
    size = len(hub.files[TINY, SHARD])
    hub.files[TINY, SHARD] += b"\0"
    run = convert(TINY, "-o", out / "x.gguf")
    assert_refused(run, out, f"hf://{TINY}@", f"{SHARD}: expected {size} bytes")


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
    assert_refused(run, out, f"hf://{TINY}@{COMMIT[:12]}/{SHARD}: {name!r}: element [0", "found nan")


@pytest.mark.parametrize("hops", [0, 1, 5])
def test_the_token_is_for_the_hub_alone(
    hub: FakeHub, out: Path, expected: dict[str, bytes], hops: int
) -> None:
    """Also if the content network redirects the reader, or redirects it back."""

    def fault(asked: Asked, answer: Answer) -> Answer:
        hop = int(asked.path.partition("?")[2] or 0) if asked.server == "cdn" else hops
        return answer if hop == hops else Answer(307, {"Location": f"{asked.path.split('?')[0]}?{hop + 1}"})

    hub.fault = fault
    assert_converts(TINY, out, expected)
    asked = [a for a in hub.asked if a.server == "cdn"]
    assert asked and not [a for a in asked if TOKEN in str(a.headers) or "authorization" in a.headers]
    asked = [a for a in hub.asked if a.server == "hub" and TINY in a.path]
    assert asked and all(a.headers["authorization"] == f"Bearer {TOKEN}" for a in asked)


def test_files_that_the_hub_itself_serves_are_read_with_the_token(
    hub: FakeHub, out: Path, expected: dict[str, bytes]
) -> None:
    hub.large = lambda name: False
    assert_converts(TINY, out, expected)
    ranged = [a for a in hub.asked if "range" in a.headers]
    assert ranged and all(a.headers["authorization"] == f"Bearer {TOKEN}" for a in ranged)


def shards(hub: FakeHub, name: str) -> list[bytes]:
    return [c for (owner, file), c in hub.files.items() if owner == name and file.endswith(".safetensors")]


def weight_bytes(hub: FakeHub, name: str) -> int:
    return sum(map(len, shards(hub, name)))


def header_bytes(hub: FakeHub, name: str) -> int:
    return sum(8 + int.from_bytes(content[:8], "little") for content in shards(hub, name))


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


def test_shards_are_never_stored_on_disk(hub: FakeHub, out: Path, tmp_path: Path) -> None:
    found: set[Path] = set()

    def look(asked: Asked, answer: Answer) -> Answer:
        large = (f for f in tmp_path.rglob("*") if f.is_file() and f.stat().st_size > 100_000)
        found.update(file.parent for file in large)
        return answer

    hub.fault = look
    assert convert(DEMO, "-o", out / "x.gguf").status == 0
    assert found <= {out / ".x.gguf.unfinished"}  # only the output itself
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
    assert_converts(TINY, out, expected)
    assert hub.served(suffix=SHARD) == 0


# Answers of the content network before the connection is lost. More than a third of the bytes is then converted; in
# Kimi K3 a third is more than everything except the packed experts.
ANSWERED = {DEMO: 60, K3: 52}


def lose_connection(hub: FakeHub, out: Path, monkeypatch: pytest.MonkeyPatch, name: str = DEMO) -> None:
    """Leave an unfinished conversion."""
    monkeypatch.setattr(unfinished, "SYNC_SECONDS", 0)
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", 1 << 16)
    hub.fault = from_cdn(dropped_at_once, after=ANSWERED[name])
    run = convert(name, "-o", out / "x.gguf", "--quiet")
    assert run.status == 1 and "continue with --resume" in run.err and len(run.err.splitlines()) == 1
    assert {file.name for file in out.iterdir()} == KEPT
    hub.fault = lambda asked, answer: answer


@pytest.mark.parametrize("name", ANSWERED)
def test_after_a_lost_connection_resume_continues(
    hub: FakeHub, out: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    lose_connection(hub, out, monkeypatch, name)
    before = hub.served()
    assert_converts(name, out, expected, "--resume")
    assert hub.served() - before < weight_bytes(hub, name) * 2 // 3, "it started again"


def test_resume_at_another_commit_is_refused(
    hub: FakeHub, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_connection(hub, out, monkeypatch)
    hub.commit = "f" * 40
    run = convert(DEMO, "-o", out / "x.gguf", "--resume")
    assert run.status == 1 and "is of another checkpoint" in run.err
    assert {file.name for file in out.iterdir()} == KEPT


def set_environment(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, tmp_path: Path) -> None:
    """Set variables for a separate process."""
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
    assert "HF_HUB_OFFLINE forbids requests to the hub" in err


def test_without_huggingface_hub_it_says_how_to_get_it(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_refused(convert(TINY, "-o", out / "x.gguf"), out, "no such folder", "pip install huggingface_hub")


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
