"""tools/prove-wheel: what the commands see, and what counts as left. test_release.py proves a wheel (--full)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from stand_in_wheel import pip_folder

from kimi_gguf.engine.wheel import record_line
from kimi_gguf.tools import prove_wheel
from kimi_gguf.tools.prove_wheel import QUESTION, Place, ProveError, check_tools, leftovers, main


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An empty prefix, without pip, so that it is made quickly."""
    made = Place(tmp_path)
    for folder in (made.home, made.temporary):
        folder.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made.prefix], check=True)
    return made


def test_the_commands_see_no_compiler(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CC", "KIMI_GGUF_CACHE", "KIMI_BUILD", "PYTHONPATH", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, "of this machine")
    monkeypatch.setenv("PIP_INDEX_URL", "https://example.org/simple")
    seen = place.environment()
    assert set(seen) - {name for name in seen if name.startswith(("PIP_", "SSL_"))} <= {
        "PATH", "HOME", "TMPDIR", "LANG", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy",
        "no_proxy",
    }  # fmt: skip
    assert seen["PIP_INDEX_URL"] == "https://example.org/simple"
    for name in ("bash", "less", "basename", "kimi-llama"):
        (place.prefix / "bin" / name).touch(0o755)
    check_tools(seen["PATH"])
    for name in (
        "git", "x86_64-linux-gnu-gcc", "clang++-19", "tcc", "as", "ld", "ld.gold", "ld.lld-19", "gmake", "samu", "c99",
    ):  # fmt: skip
        tool = place.prefix / "bin" / name
        tool.touch(0o755)
        with pytest.raises(
            ProveError, match=rf"expected no compiler and no git, found .*/bin/{re.escape(name)}$"
        ):
            check_tools(seen["PATH"])
        tool.unlink()


def test_what_is_left_is_found(place: Place) -> None:
    """Not counted: what was there, another package with its compiled files, and caches."""
    (packages,) = place.prefix.glob("lib/python*/site-packages")
    (packages / "there.py").touch()
    before = place.files()
    (packages / "other-1.0.dist-info").mkdir()
    record = packages / "other-1.0.dist-info/RECORD"
    record.write_text("other.py,,\nother-1.0.dist-info/RECORD,,\nother-1.0.dist-info/METADATA,,\n")
    (record.parent / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (packages / "other.py").touch()
    compiled = packages / "__pycache__"
    compiled.mkdir(exist_ok=True)
    for name in ("other", "gone"):
        (compiled / f"{name}.cpython-311.pyc").touch()
    for path in (".cache/kimi-gguf/engines", ".config/matplotlib", ".config/kimi"):
        (place.home / path).mkdir(parents=True)
    (packages / "kimi_gguf/engine").mkdir(parents=True)
    (place.prefix / "bin/kimi-llama").symlink_to("nowhere")
    (place.temporary / "x").touch()
    assert leftovers(place, before) == sorted(
        (
            compiled / "gone.cpython-311.pyc",
            packages / "kimi_gguf/engine",
            place.prefix / "bin/kimi-llama",
            place.home / ".config/kimi",
            place.temporary / "x",
        )
    )


def test_a_command_that_fails_is_named(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ProveError, match="exit status 3\nwhat it said"):
        place.call("python", "-c", "print('what it said'); raise SystemExit(3)")
    assert "  python -c " in capsys.readouterr().out


def test_a_file_that_is_no_wheel_ends_with_status_1(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kimi_gguf-1.0-py3-none-any.whl").write_text("not a wheel")
    assert main([str(tmp_path / "kimi_gguf-1.0-py3-none-any.whl"), "--out", str(tmp_path / "out")]) == 1
    assert capfd.readouterr().err.startswith("prove-wheel: error: exit status 1\n")
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "none.whl")])


def write_wheel(folder: Path, name: str, files: dict[str, str], requires: str = "") -> Path:
    """A wheel of version 1 with these files."""
    info = f"{name}-1.dist-info"
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [record_line(each, text.encode()) for each, text in files.items()]
    path = folder / f"{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for each, text in (*files.items(), (f"{info}/RECORD", "".join([*lines, f"{info}/RECORD,,\n"]))):
            archive.writestr(each, text)
    return path


@pytest.fixture
def place_with_pip(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The prefix sees this environment's pip. Packages come from `tmp_path`/packages alone."""
    (packages,) = place.prefix.glob("lib/python*/site-packages")
    (packages / "pip.pth").write_text(f"{pip_folder().parent}\n")
    (tmp_path / "packages").mkdir()
    for name, text in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path / "packages"))):
        monkeypatch.setenv(name, text)
    return place


def test_a_requirement_without_a_wheel_is_not_compiled(place_with_pip: Place, tmp_path: Path) -> None:
    """Its setup.py would run, or pip would look for the packages that it is built with."""
    (tmp_path / "setup.py").write_text("from setuptools import setup; setup(name='needed', version='1')")
    (tmp_path / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: needed\nVersion: 1\n")
    with tarfile.open(tmp_path / "packages/needed-1.tar.gz", "w:gz") as archive:
        for name in ("setup.py", "PKG-INFO"):
            archive.add(tmp_path / name, f"needed-1/{name}")
    wheel = write_wheel(tmp_path, "asks", {"asks.py": ""}, requires="needed")
    with pytest.raises(ProveError, match=r"No matching distribution found for needed"):
        place_with_pip.install(wheel)
    write_wheel(tmp_path / "packages", "needed", {"needed.py": ""})
    place_with_pip.install(wheel)
    place_with_pip.call("python", "-c", "import asks, needed")


def test_a_compiler_that_pip_installs_is_found(place_with_pip: Place, tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, "brings", {"brings-1.data/scripts/ninja": "#!python\n"})
    with pytest.raises(ProveError, match=r"expected no compiler and no git, found .*/prefix/bin/ninja"):
        place_with_pip.install(wheel)


CHAT = f"build: 1\n> {QUESTION}\n{{}}\n\n[ Prompt: 1 t/s ]\n"


def test_an_answer_is_more_than_the_question() -> None:
    prove_wheel.check_answer("x", "elephant: a beast.", CHAT.format("elephant: a beast."))
    for echo in (QUESTION, "elephant", f"> {QUESTION}?", ""):
        with pytest.raises(ProveError, match=r"x: expected an answer to 'define: elephant', found"):
            prove_wheel.check_answer("x", echo, CHAT.format(echo))
    for answer in (
        "elephant: another beast.",
        "build: 1",
    ):  # the chat's answer is another; text before the question
        with pytest.raises(ProveError, match=r"x: expected the answer of kimi-llama chat, found"):
            prove_wheel.check_answer("x", answer, CHAT.format("elephant: a beast."))


def test_a_run_continues_the_prompt() -> None:
    begins = prove_wheel.BEGINNING
    prove_wheel.check_run(f"{begins} eats. [end of text]\n")
    for printed in ("", "eats.\n", f"{begins}\n", f"{begins} ...\n", f"{begins} [end of text]\n\n"):
        with pytest.raises(ProveError, match="run: expected 'a large animal that' and words after it"):
            prove_wheel.check_run(printed)


def test_inspect_shows_the_type_and_all_layers() -> None:
    def printed(kind: str, *layers: int) -> str:
        return json.dumps({"type": kind, "layers": [{"index": index} for index in (-1, *layers)]})

    prove_wheel.check_inspect(printed("Q4_K_M", 0, 1), "Q4_K_M", 2)
    for wrong in (printed("Q8_0", 0, 1), printed("Q4_K_M", 0), printed("Q4_K_M", 0, 2)):
        with pytest.raises(ProveError, match="inspect: expected Q4_K_M with 2 layers, found Q"):
            prove_wheel.check_inspect(wrong, "Q4_K_M", 2)


def test_the_bench_measured_prompts_and_decoding() -> None:
    def printed(*rows: str) -> str:
        lines = ["| model | backend | test |              t/s |", "| --- | --- | ---: | ---: |"]
        return "\n".join([*lines, *(f"| kimi | CPU | {row} |" for row in rows), "", "build: 1", ""])

    prompt, decoding = "pp512 |  4711.25 ± 3.10", "tg128 |   815.00 ± 9.99"
    prove_wheel.check_bench(printed(prompt, decoding))
    speeds = [
        printed(prompt, decoding, f"tg128 | {bad} ± 0.00") for bad in ("0.00", "nan", "-1.0", "...", "inf")
    ]
    for wrong in ("", printed(), printed(prompt), printed(decoding), *speeds):
        with pytest.raises(ProveError, match="bench: expected tokens per second of pp and tg"):
            prove_wheel.check_bench(wrong)


def test_doctor_finds_the_engine_of_the_wheel_and_no_compiler() -> None:
    def printed(build: str, compiler: str, passed: bool = True, healthy: bool = True) -> str:
        machine = [
            {"name": name, "seen": missing if name != "C++ compiler" else compiler}
            for name in ("C++ compiler", "cmake", "ninja", "processors")
        ]
        return json.dumps(
            {"healthy": healthy, "build": {"seen": build, "passed": passed}, "machine": machine}
        )

    missing = "not found (only kimi-llama build needs it)"
    prove_wheel.check_doctor(printed("wheel 0123 (portable: AVX2)", missing))
    with pytest.raises(ProveError, match="expected the wheel's engine, found cpu 0123"):
        prove_wheel.check_doctor(printed("cpu 0123 (native: AVX2)", missing))
    with pytest.raises(ProveError, match=r"expected no C\+\+ compiler, found g\+\+ 12"):
        prove_wheel.check_doctor(printed("wheel 0123 (portable: AVX2)", "g++ 12"))
    with pytest.raises(ProveError, match=r"expected no ninja, found no check"):
        prove_wheel.check_doctor(printed("wheel 0123", missing).replace('"ninja"', '"nothing"'))
    for passed, healthy in ((False, True), (True, False)):
        with pytest.raises(ProveError, match="doctor: expected that all checks pass, found"):
            prove_wheel.check_doctor(printed("wheel 0123", missing, passed, healthy))


# Answers POST requests with the statuses in its second line; then it waits, or ends if there are no more.
_SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
statuses = {statuses}
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        status = statuses.pop(0)
        self.send_response(status)
        self.end_headers()
        reply = {{"choices": [{{"message": {{"content": "elephant: a beast."}}}}]}}
        self.wfile.write(json.dumps(reply if status == 200 else {{"error": "status " + str(status)}}).encode())
print("the server's log", sys.argv[1:3], flush=True)
server = HTTPServer(("127.0.0.1", int(sys.argv[4])), Handler)
while statuses:
    server.handle_request()
sys.exit(3)
"""


@pytest.mark.parametrize(
    ("statuses", "found"),
    [
        ([503, 503, 200], None),
        ([400, 200], "expected an answer, found HTTP 400\n.*status 400"),
        ([503, 500, 200], "expected an answer, found HTTP 500\n.*status 500"),
        ([], "exit status 3"),
    ],
)
def test_a_server_is_asked_again_only_while_it_loads(
    place: Place, tmp_path: Path, statuses: list[int], found: str | None
) -> None:
    program = place.prefix / "bin/kimi-llama"
    program.write_text(f"#!{sys.executable}\n{_SERVER.format(statuses=statuses)}")
    program.chmod(0o755)
    if found is None:
        assert prove_wheel.serve(place, tmp_path / "x.gguf") == "elephant: a beast."
        return
    with pytest.raises(
        ProveError, match=rf"(?s)^kimi-llama serve: ({found}).*the server's log \['serve', '.*x.gguf'\]"
    ):
        prove_wheel.serve(place, tmp_path / "x.gguf")
