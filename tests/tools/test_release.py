"""The release: a wheel that contains the engine, an sdist, an SBOM."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import py_compile
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from kimi_gguf.engine import build, doctor
from kimi_gguf.engine.build_spec import make_build_spec
from kimi_gguf.engine.builds import Engine, upstream_source
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.progress import Silent
from kimi_gguf.engine.version import VERSION
from kimi_gguf.engine.wheel import record_line, write_zip
from kimi_gguf.patches.pin import load_pin
from kimi_gguf.tools import prove_wheel, release
from kimi_gguf.tools.sbom import components, notices, sbom

pytestmark = pytest.mark.engine
SECONDS = 1_767_225_600
ENGINE = f"{release.ENGINE}/"


@pytest.fixture(scope="module")
def source(shared_cache: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KIMI_GGUF_CACHE", str(shared_cache))
        return upstream_source()


def make(folder: Path, engine: Engine, source: Path) -> Path:
    """The wheel as tools/release makes it, with this machine's build in place of one for all CPUs."""
    folder.mkdir()
    pure = release.pure_wheel(release.make_sdist(folder, VERSION, SECONDS), folder)
    document = sbom(source, load_pin(), VERSION, "MIT")
    return release.make_wheel(pure, folder, engine, notices(source, load_pin()), document, SECONDS)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, engine: Engine, source: Path) -> Path:
    return make(tmp_path_factory.mktemp("release") / "first", engine, source)


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed by pip."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(folder), str(wheel)], check=True)
    return folder


def in_site(
    site: Path, cache: Path, *words: str | Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with the installed wheel, no compiler on PATH, and an empty cache."""
    environment = {"PATH": str(cache), "KIMI_GGUF_CACHE": str(cache), "PYTHONPATH": str(site), **variables}
    command = [sys.executable, "-P", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_equal_inputs_give_equal_bytes(
    wheel: Path, tmp_path: Path, engine: Engine, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same compilers in another folder and under other names, another cache, another time of compiling."""
    here = make_build_spec()
    for variable, (language, compiler) in zip(("CC", "CXX"), here.compilers, strict=True):
        other = tmp_path / "other (b)" / f"mine-{language}"
        other.parent.mkdir(exist_ok=True)
        other.symlink_to(compiler.path)
        monkeypatch.setenv(variable, shlex.quote(str(other)))
    there = make_build_spec()
    assert there.key != here.key  # the cache keeps builds of both
    wanted = {"programs": engine.manifest["programs"], "tests": []}
    manifest = build._manifest(there, engine.manifest["tree_sha256"], wanted, 1.0)
    assert manifest["compilers"] != engine.manifest["compilers"]
    shutil.copytree(engine.prefix, tmp_path / "prefix")
    moved = replace(engine, key=there.key, prefix=tmp_path / "prefix", manifest=manifest)
    again = make(tmp_path / "again", moved, source)
    assert again.read_bytes() == wheel.read_bytes()
    sdists = [next(path.parent.glob("*.tar.gz")).read_bytes() for path in (wheel, again)]
    assert sdists[0] == sdists[1]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("/usr/bin/cc: cc (Debian 12.2.0-14) 12.2.0", "GCC (Debian 12.2.0-14) 12.2.0"),
        ("/opt/x/bin/g++-12: g++-12 (GCC) 12.2.0", "GCC (GCC) 12.2.0"),
        ("/usr/bin/clang: Debian clang version 14.0.6", "Debian clang version 14.0.6"),
        (
            "/bin/cc: clang version 20 (https://example.org/llvm 24a3)",
            "clang version 20 (https://example.org/llvm 24a3)",
        ),
    ],
)
def test_a_compiler_is_named_by_its_version(text: str, version: str) -> None:
    assert release.compiler_version(text) == version


def test_other_inputs_have_another_key(engine: Engine) -> None:
    compilers = {"C": "/usr/bin/cc: cc (Debian) 99.0", "C++": "/usr/bin/c++: c++ (Debian) 99.0"}
    keys = {release.published_manifest(each, SECONDS)["key"] for each in (
        engine,
        replace(engine, manifest={**engine.manifest, "compilers": compilers}),
        replace(engine, manifest={**engine.manifest, "series_sha256": "0" * 64}),
    )}  # fmt: skip
    assert len(keys) == 3 and engine.key not in keys


def test_the_wheel_is_built_with_the_pinned_setuptools(wheel: Path) -> None:
    pinned = dict(
        line.split("==")
        for line in (release.ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert f"Generator: setuptools ({pinned['setuptools']})" in archive.read(name).decode()


def test_the_hashes_are_those_of_what_one_run_made(
    engine: Engine, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of a wheel of the same version that the folder had before. All names are of this release."""
    monkeypatch.setattr(release, "ensure", lambda **_: engine)
    monkeypatch.setattr(release, "upstream_source", lambda: source)
    monkeypatch.setattr(release, "check_policy", lambda *_: None)
    (tmp_path / f"kimi_gguf-{VERSION}-py3-none-elsewhere.whl").write_bytes(b"of another run")
    made = release.release(tmp_path, Silent())
    listed = dict(reversed(line.split()) for line in (tmp_path / "SHA256SUMS").read_text().splitlines())
    assert len(listed) == 3 and set(listed) == {path.name for path in made} - {"SHA256SUMS"}
    assert all(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == listed[name] for name in listed)


@pytest.mark.parametrize("committed", [False, True])
def test_files_that_change_while_the_engine_compiles_are_not_packed(
    committed: bool, engine: Engine, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a checkout with one file, which is edited meanwhile."""
    checkout, out = tmp_path / "checkout", tmp_path / "out"
    checkout.mkdir()

    def git(*words: str) -> None:
        names = ("-c", "user.name=n", "-c", "user.email=e")
        subprocess.run(["git", "-C", checkout, *names, *words], check=True, capture_output=True)

    def edit(text: str, commit: bool) -> None:
        (checkout / "file").write_text(text)
        if commit:
            git("add", "file")
            git("commit", "--message", text)

    def compiled(**_: object) -> Engine:
        edit("after", committed)
        return engine

    git("init")
    edit("before", True)
    monkeypatch.setattr(release, "ROOT", checkout)
    monkeypatch.setattr(release, "ensure", compiled)
    monkeypatch.setattr(release, "upstream_source", lambda: source)
    with pytest.raises(EngineError, match="tracked files changed while the engine compiled"):
        release.release(out, Silent())
    assert list(out.iterdir()) == []


def test_record_has_the_hash_of_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    (record,) = (name for name in contents if name.endswith(".dist-info/RECORD"))
    lines = [record_line(name, content) for name, content in contents.items() if name != record]
    assert contents[record].decode().splitlines(keepends=True) == [*lines, f"{record},,\n"]


def test_the_wheel_has_programs_and_libraries_but_no_tests(wheel: Path, engine: Engine) -> None:
    assert any(engine.bin.glob("test-*"))  # so leaving them out can be seen
    with zipfile.ZipFile(wheel) as archive:
        modes = {entry.filename: entry.external_attr >> 16 & 0o777 for entry in archive.infolist()}
    assert modes[f"{ENGINE}bin/llama-server"] == 0o755
    assert not [
        name for name in modes if "/bin/test-" in name or name.startswith("tests/") or "pytest" in name
    ]
    assert {f"{ENGINE}lib/{path.name}" for path in engine.lib.iterdir()} <= set(modes)
    assert f"{ENGINE}build.log" not in modes


def imports(source: str) -> set[str]:
    """The modules of this project that a module names: in imports, and in strings, as for `python -m`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"kimi_gguf(?:\.\w+)+", node.value))
    return found


def test_the_wheel_has_only_modules_that_users_run(wheel: Path) -> None:
    """Those that the commands import, from nine packages; maintainers' programs stay in the checkout."""
    with zipfile.ZipFile(wheel) as archive:
        files = [Path(name) for name in archive.namelist() if name.endswith(".py")]
        sources = {
            ".".join(file.with_suffix("").parts).removesuffix(".__init__"): archive.read(str(file)).decode()
            for file in files
            if not str(file).startswith((ENGINE, "kimi_gguf/ggml_ops/"))  # llama_cpp; sources of the engine
        }
    packages = {"bench", "engine", "patches", "scripts", "validate"}
    packages |= {"convert", *(f"convert.{name}" for name in ("card", "model", "output", "source", "types"))}
    inside = {name.removeprefix("kimi_gguf.") for name in sources}
    assert {name for name in inside if any(other.startswith(f"{name}.") for other in inside)} == packages
    scripts = {name for name in inside if name.startswith("scripts.")}
    assert scripts == {"scripts.commands", "scripts.kimi_llama", "scripts.llama_tools"}
    # What users start: the commands, llama_cpp from Python, and the program that an error about the series names.
    reached, names = set(), ["scripts.commands", "engine.llama_cpp", "patches.__main__"]
    names = [f"kimi_gguf.{name}" for name in names]
    while names:
        name = names.pop()
        if name in sources and name not in reached:
            reached.add(name)
            names += [*imports(sources[name]), name.rpartition(".")[0]]
    assert sorted(sources.keys() - reached) == []


def test_the_manifest_names_no_folder_of_the_machine(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"{ENGINE}manifest.json").decode()
    assert json.loads(text)["built"] == "2026-01-01T00:00:00Z"
    assert "/usr" not in text
    assert str(Path.home()) not in text


def test_commands_use_the_engine_of_the_wheel(site: Path, tmp_path: Path, demo_dir: Path) -> None:
    gguf = tmp_path / "demo.gguf"
    made = in_site(
        site, tmp_path, "-m", "kimi_gguf.convert.cli", demo_dir, "-o", gguf, "--type", "Q4_K_M", "--quiet"
    )
    assert (made.returncode, made.stderr) == (0, "")
    ran = in_site(
        site,
        tmp_path,
        "-m",
        "kimi_gguf.scripts.kimi_llama",
        "run",
        gguf,
        "-p",
        "a large",
        "-n",
        "4",
        "--temp",
        "0",
    )
    assert ran.returncode == 0, ran.stderr
    assert "kimi-llama: build wheel" in ran.stderr
    assert not (tmp_path / "engines").exists()
    timed = in_site(site, tmp_path, "-m", "kimi_gguf.scripts.kimi_llama", "bench", gguf, "--depth", "0")
    assert timed.returncode == 0, timed.stderr
    assert "no C++ compiler" in timed.stderr
    assert "pp512" in timed.stdout
    refused = in_site(site, tmp_path, "-m", "kimi_gguf.scripts.kimi_llama", "bench")
    assert refused.returncode == 1
    assert "give a GGUF file" in refused.stderr


def test_doctor_compares_the_commands_and_uninstalling_leaves_no_folder(wheel: Path, tmp_path: Path) -> None:
    """The commands are in the prefix's bin/, where pip wrote them."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    assert (packages / "kimi_gguf/engine/prebuilt/bin/llama-cli").is_file()
    look = [python, "-P", "-c", "from kimi_gguf.engine import doctor; print(doctor._unchanged_files())"]
    environment = {"PYTHONPATH": os.pathsep.join([str(packages), *sys.path])}
    looked = subprocess.run(look, env=environment, capture_output=True, text=True, check=False)
    assert looked.stdout.endswith(" files as in the wheel\n"), looked.stderr
    with (python.parent / "kimi-llama").open("a") as command:
        command.write("# more\n")
    looked = subprocess.run(look, env=environment, capture_output=True, text=True, check=False)
    assert looked.returncode == 1 and "found ../../../bin/kimi-llama;" in looked.stderr
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "kimi-gguf"], check=True)
    assert not [path.name for path in packages.iterdir() if "kimi" in path.name]
    assert not [path.name for path in python.parent.iterdir() if "kimi" in path.name]


@pytest.mark.full
def test_the_wheel_needs_nothing_but_python(wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the report, which needs torch. Installs the packages that the wheel requires."""
    assert prove_wheel.main([str(wheel), "--without-report"]) == 0, capsys.readouterr().err


LLAMA_CPP = """
import sys
from kimi_gguf.engine import llama_cpp
import llama_cpp as other
assert other is llama_cpp
llama_cpp.llama_backend_init()
maps = {line.split()[-1] for line in open("/proc/self/maps") if "libllama" in line or "libggml" in line}
print(llama_cpp.__file__, *maps, sep="\\n")
"""


def test_llama_cpp_is_that_of_the_wheel(site: Path, tmp_path: Path) -> None:
    ran = in_site(site, tmp_path, "-c", LLAMA_CPP)
    assert ran.returncode == 0, ran.stderr
    paths = [Path(line) for line in ran.stdout.splitlines()]
    assert len(paths) > 3
    assert all(path.is_relative_to(site / release.ENGINE) for path in paths)


CHAT = """
import sys
from kimi_gguf.engine import llama_cpp
from llama_cpp import Llama
assert Llama is llama_cpp.Llama
model = Llama(sys.argv[1], n_ctx=256, n_threads=1, verbose=False)
messages = [{"role": "user", "content": "define: elephant"}]
answer = model.create_chat_completion(messages, max_tokens=60, temperature=0.0)
print(answer["choices"][0]["message"]["content"])
"""


def test_llama_of_the_wheel_chats(site: Path, tmp_path: Path, demo_gguf: Callable[[str], Path]) -> None:
    """Its answer is that of the wheel's program. An installed llama-cpp-python stays what `import llama_cpp` gives."""
    installed = tmp_path / "installed/llama_cpp/__init__.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    assert not (site / "llama_cpp").exists()
    paths = os.pathsep.join(map(str, (site, installed.parents[1])))
    model = demo_gguf("Q8_0")
    ran = in_site(site, tmp_path, "-c", CHAT, model, PYTHONPATH=paths)
    assert ran.returncode == 0, ran.stderr
    answer = ran.stdout.strip()
    assert answer.startswith("elephant:") and answer.endswith(".")  # it ends by itself
    other = in_site(site, tmp_path, "-c", "import llama_cpp; print(llama_cpp.__file__)", PYTHONPATH=paths)
    assert other.stdout.strip() == str(installed)
    words = ("chat", model, "--single-turn", "-p", "define: elephant", "-n", "60", "--temp", "0")
    program = in_site(site, tmp_path, "-m", "kimi_gguf.scripts.kimi_llama", *words, "--threads", "1")
    assert answer in program.stdout


def test_another_llama_cpp_in_the_process_is_refused(site: Path, tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text("")
    paths = os.pathsep.join(map(str, (tmp_path, site)))
    ran = in_site(
        site, tmp_path, "-c", "import llama_cpp; from kimi_gguf.engine import llama_cpp", PYTHONPATH=paths
    )
    assert ran.returncode == 1
    assert "ImportError: llama_cpp was imported from" in ran.stderr


def test_torch_and_the_engine_are_in_one_process(site: Path, tmp_path: Path) -> None:
    ran = in_site(
        site,
        tmp_path,
        "-c",
        "import torch; from kimi_gguf.engine import llama_cpp; llama_cpp.llama_backend_init(); "
        "print(torch.ones(200, 200).matmul(torch.ones(200, 200)).sum().item())",
        LD_LIBRARY_PATH="",
    )
    assert (ran.returncode, ran.stdout) == (0, "8000000.0\n"), ran.stderr


def test_doctor_finds_a_changed_file(site: Path, tmp_path: Path) -> None:
    words = ("-m", "kimi_gguf.scripts.kimi_llama", "doctor", "--json")
    healthy = json.loads(in_site(site, tmp_path, *words).stdout)
    assert healthy["installed"]["passed"], healthy["installed"]
    assert healthy["healthy"], healthy
    changed = {
        "kimi_gguf/convert/plan.py": "kimi_gguf/convert/plan.py",
        "../../bin/kimi-llama": "bin/kimi-llama",
    }
    texts = {path: (site / path).read_text() for path in changed.values()}
    try:
        for path, text in texts.items():
            (site / path).write_text(text + "\n")
        ran = in_site(site, tmp_path, *words)
    finally:
        for path, text in texts.items():
            (site / path).write_text(text)
    assert ran.returncode == 1
    seen = json.loads(ran.stdout)["installed"]["seen"]
    assert seen.startswith("2 of ") and all(name in seen for name in changed)


def test_doctor_finds_a_missing_manifest(site: Path, tmp_path: Path) -> None:
    """Without it there is no build, but still a wheel whose files are checked."""
    manifest = site / release.ENGINE / "manifest.json"
    moved = manifest.rename(tmp_path / "manifest.json")
    try:
        ran = in_site(site, tmp_path, "-m", "kimi_gguf.scripts.kimi_llama", "doctor", "--json")
    finally:
        moved.rename(manifest)
    assert ran.returncode == 1
    assert f"{manifest.relative_to(site)} (missing)" in json.loads(ran.stdout)["installed"]["seen"]


def installed(
    folder: Path, place: str, commands: str, bin_folder: str, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A package in `place`, whose RECORD names its command in `commands`; it is in `bin_folder`. Returns the site."""
    site = folder / place
    contents = {"kimi_gguf/some.py": b"", f"{commands}/kimi-llama": b"#!python\n"}
    (site / "kimi_gguf").mkdir(parents=True)
    (folder / bin_folder).mkdir(parents=True, exist_ok=True)
    (site / "kimi_gguf/some.py").write_bytes(b"")
    (folder / bin_folder / "kimi-llama").write_bytes(b"#!python\n")
    (site / "kimi_gguf-1.dist-info").mkdir()
    (site / "kimi_gguf-1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: kimi-gguf\nVersion: 1\n"
    )
    lines = [record_line(name, content) for name, content in contents.items()]
    record = "kimi_gguf-1.dist-info/RECORD"
    (site / record).write_text("".join([*lines, f"{record},,\n"]))
    monkeypatch.setattr(doctor, "PREBUILT", site / "kimi_gguf/engine/prebuilt")
    return site


PACKAGES = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"


@pytest.mark.parametrize(
    ("place", "commands", "bin_folder"),
    [
        pytest.param(PACKAGES, "../../../bin", "bin", id="environment, --user or --prefix"),
        pytest.param("lib/python", "../../bin", "bin", id="home"),
        pytest.param("target", "../../bin", "target/bin", id="pip --target"),
        pytest.param("target", "bin", "target/bin", id="other installers' --target"),
    ],
)
def test_doctor_compares_commands_wherever_they_are(
    place: str, commands: str, bin_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path / "own", place, commands, bin_folder, monkeypatch)
    assert doctor._unchanged_files() == "2 files as in the wheel"
    command = tmp_path / "own" / bin_folder / "kimi-llama"
    for change, found in ((command.touch, ""), (command.unlink, r" \(missing\)")):
        command.write_bytes(b"other")
        change()
        with pytest.raises(
            EngineError, match=rf"1 of 2 installed files .* found {commands}/kimi-llama{found};"
        ):
            doctor._unchanged_files()


@pytest.mark.parametrize(
    "hostile", ["../../../other/kimi-llama", "kimi_gguf/../../../bin/x", "/bin/sh", "../bin/x"]
)
def test_doctor_reads_no_file_outside_of_the_installation(
    hostile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = installed(tmp_path / "own", PACKAGES, "../../../bin", "bin", monkeypatch)
    with (site / "kimi_gguf-1.dist-info/RECORD").open("a") as record:
        record.write(record_line(hostile, b""))
    read = list[Path]()
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or whole(path))
    with pytest.raises(EngineError, match=r"1 files in RECORD are outside .* not read") as caught:
        doctor._unchanged_files()
    assert caught.value.found == hostile
    assert read == [site / "kimi_gguf/some.py", tmp_path / "own/bin/kimi-llama"]


@pytest.mark.parametrize("text", [None, "", "no list\n"])
def test_doctor_says_that_the_list_of_files_is_missing(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = (
        installed(tmp_path, PACKAGES, "../../../bin", "bin", monkeypatch) / "kimi_gguf-1.dist-info/RECORD"
    )
    record.unlink() if text is None else record.write_text(text)
    with pytest.raises(EngineError, match=r"RECORD in kimi_gguf-.*dist-info, is missing or damaged"):
        doctor._unchanged_files()


def hashes_removed(text: str, name: str) -> str:
    """A RECORD without the hash of the files whose name ends so."""
    return re.sub(rf"(?m)^(\S*{re.escape(name)}),sha256=.*$", r"\1,,", text)


@pytest.mark.parametrize(
    ("unhashed", "found"),
    [
        ("", "kimi_gguf/some.py (no hash in RECORD), ../../../bin/kimi-llama (no hash in RECORD)"),
        ("some.py", "kimi_gguf/some.py (no hash in RECORD)"),
    ],
)
def test_doctor_finds_a_list_without_hashes(
    unhashed: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installers write a hash for every file but the compiled ones and the list itself."""
    site = installed(tmp_path, PACKAGES, "../../../bin", "bin", monkeypatch)
    record = site / "kimi_gguf-1.dist-info/RECORD"
    compiled = Path(importlib.util.cache_from_source(str(site / "kimi_gguf/some.py")))
    with record.open("a") as file:
        file.write(f"{compiled.relative_to(site)},,\n")
    assert doctor._unchanged_files() == "2 files as in the wheel"
    record.write_text(hashes_removed(record.read_text(), unhashed))
    with pytest.raises(EngineError, match=r"of 2 installed files were changed") as caught:
        doctor._unchanged_files()
    assert caught.value.found == found


def test_doctor_finds_a_compiled_file_in_the_list_that_has_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python runs it as a module. Only files in __pycache__ are compared with their sources."""
    site = installed(tmp_path, PACKAGES, "../../../bin", "bin", monkeypatch)
    (site / "kimi_gguf/alone.pyc").touch()
    with (site / "kimi_gguf-1.dist-info/RECORD").open("a") as record:
        record.write("kimi_gguf/alone.pyc,,\n")
    with pytest.raises(EngineError, match=r"found kimi_gguf/alone\.pyc \(no hash in RECORD\);"):
        doctor._unchanged_files()


def test_doctor_does_not_wait_for_a_pipe_in_place_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = installed(tmp_path, PACKAGES, "../../../bin", "bin", monkeypatch)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    for name in ("kimi_gguf/some.py", "../../../bin/kimi-llama"):
        (site / name).unlink()
        os.mkfifo(site / name)
    with pytest.raises(EngineError, match=r"some\.py \(not a file\), .*/kimi-llama \(not a file\);"):
        doctor._unchanged_files()


@pytest.mark.parametrize(
    ("read", "name"),
    [(build.read_manifest, "manifest.json"), (doctor._record, "kimi_gguf-1.dist-info/RECORD")],
)
def test_no_command_waits_for_a_pipe_in_place_of_a_list(
    read: Callable[[Path], object], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    monkeypatch.setattr(Path, "read_text", lambda path, **_: pytest.fail(f"{path} was read"))
    assert not read(tmp_path)


def test_doctor_misses_an_engine_whose_folder_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build in the cache does not make up for it: the wheel's files are still checked."""
    site = installed(tmp_path, PACKAGES, "../../../bin", "bin", monkeypatch)
    assert not doctor._has_engine(), "a wheel without an engine"
    with (site / "kimi_gguf-1.dist-info/RECORD").open("a") as record:
        record.write(record_line(f"{release.ENGINE}/manifest.json", b"{}"))
    assert doctor._has_engine()
    with pytest.raises(EngineError, match=r"found kimi_gguf/engine/prebuilt/manifest\.json \(missing\);"):
        doctor._unchanged_files()


def installed_files(site: Path, cache: Path) -> tuple[bool, str]:
    """What doctor says of the files: whether they are the wheel's, and the text."""
    ran = in_site(site, cache, "-m", "kimi_gguf.scripts.kimi_llama", "doctor", "--json")
    found = json.loads(ran.stdout)["installed"]
    assert ran.returncode == 0 or not found["passed"], found
    return found["passed"], found["seen"]


def test_doctor_finds_added_files(site: Path, tmp_path: Path) -> None:
    """ggml would load the library, and the folder's libraries; Python runs __init__.py, and a .pyc without a source.
    Python's caches of the wheel's files appear when it runs."""
    package, engine = site / "kimi_gguf", site / release.ENGINE
    link = engine / "lib/linked"
    added = [
        package / "convert/__pycache__/gone.cpython-399.pyc",
        package / "convert/alone.pyc",
        package / "validate/added.py",
        engine / "bin/added",
    ]
    library = engine / "lib/libggml-cpu-added.so"
    cache = engine / "python/llama_cpp/__pycache__/llama.cpython-399.pyc"
    try:
        for path in (*added, library, cache):
            path.touch()
        link.symlink_to(tmp_path)
        passed, seen = installed_files(site, tmp_path)
    finally:
        for path in (*added, library, cache, link):
            path.unlink()
    assert not passed
    names = sorted(path.relative_to(site).as_posix() for path in (*added, library, link))
    assert seen.startswith("6 files in the package's folder are not from the wheel")
    assert f"found {', '.join(names[:5])};" in seen


def test_doctor_finds_a_compiled_file_that_is_not_of_its_source(site: Path, tmp_path: Path) -> None:
    """Python would run it without a look at the source (PEP 552: unchecked). One of an older source is not used."""
    source = site / "kimi_gguf/convert/inspect_model.py"  # doctor does not import it
    cache = Path(importlib.util.cache_from_source(str(source)))
    before = cache.read_bytes() if cache.is_file() else None
    other = tmp_path / "other.py"
    other.write_text("print('not of this source')\n")
    try:
        py_compile.compile(str(source), str(cache), doraise=True)
        assert installed_files(site, tmp_path)[0]
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(str(other), str(cache), doraise=True, invalidation_mode=mode)
        passed, seen = installed_files(site, tmp_path)
        py_compile.compile(str(other), str(cache), doraise=True)
        assert installed_files(site, tmp_path)[0]
    finally:
        cache.unlink()
        if before is not None:
            cache.write_bytes(before)
    assert not passed
    assert f"found {source.relative_to(site)} (its compiled file in __pycache__)" in seen


@pytest.mark.parametrize("level", [0, 1, 2])
def test_compiled_files_of_all_levels_are_compared(
    level: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python runs that of its own level: with -O another one than doctor, which mostly runs without options."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    source, other = tmp_path / "module.py", tmp_path / "other.py"
    source.write_text("assert print('of the source')\n")
    other.write_text("print('of another')\n")
    cache = Path(importlib.util.cache_from_source(str(source), optimization=level or ""))
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH

    def differs(text: Path, mode: py_compile.PycInvalidationMode = unchecked) -> bool:
        py_compile.compile(str(text), str(cache), doraise=True, optimize=level, invalidation_mode=mode)
        found = doctor._compiled_otherwise(source, source.read_bytes())
        assert list(cache.parent.iterdir()) == [cache], "doctor writes none"
        return found

    assert not differs(source)
    assert differs(other)
    ran = subprocess.run(
        [sys.executable, *["-O"] * level, "-c", "import module"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.stdout == "of another\n"
    assert not differs(other, py_compile.PycInvalidationMode.CHECKED_HASH), "Python does not run it"
    cache.write_bytes(cache.read_bytes()[:20])
    assert not doctor._compiled_otherwise(source, source.read_bytes()), "checked: the source runs"
    py_compile.compile(str(other), str(cache), doraise=True, optimize=level, invalidation_mode=unchecked)
    cache.write_bytes(cache.read_bytes()[:20])
    assert doctor._compiled_otherwise(source, source.read_bytes()), "damaged"


def test_a_wheel_for_another_architecture_is_named_after_it(engine: Engine) -> None:
    """Builds that a user compiles take the options of the wheel's build, so those are not a cross compilation."""
    settings = {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64"}
    settings |= {"CMAKE_CROSSCOMPILING_EMULATOR": "qemu-aarch64"}
    options = {**engine.manifest["options"], **settings}
    cross = replace(engine, manifest={**engine.manifest, "options": options, "cpu": "aarch64"})
    assert release.platform_tag(cross) == "manylinux_2_34_aarch64"
    published = release.published_manifest(cross, SECONDS)
    assert published["options"] == engine.manifest["options"]
    assert published["cpu"] == "aarch64"


def test_a_compiler_for_another_architecture_is_chosen_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "")  # so that what the call sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match=r"apt install g\+\+-aarch64-linux-gnu qemu-user"):
        release.cross_compilation("aarch64")
    (tmp_path / "aarch64-linux-gnu-g++").touch(0o755)
    release.cross_compilation("aarch64")
    assert (os.environ["CC"], os.environ["CXX"]) == ("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++")
    monkeypatch.setenv("CXX", "mine")
    release.cross_compilation("aarch64")
    assert os.environ["CXX"] == "mine"


def test_a_release_does_not_depend_on_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPATH", "/opt/headers")
    monkeypatch.setenv("CXXFLAGS", "-O0")
    notes: list[str] = []
    reporter = Silent()
    monkeypatch.setattr(reporter, "note", notes.append)
    release.forget_variables(reporter)
    assert not {"CPATH", "CXXFLAGS"} & set(os.environ)
    assert notes == ["not used for a release: CXXFLAGS, CPATH"]
    release.forget_variables(reporter)
    assert len(notes) == 1


@pytest.mark.parametrize(
    "text", ["abc", "0", "-1", "315532799", "4294967296", "1e9", "\u0663" * 9, "9" * 5000]
)
def test_a_time_that_archives_cannot_have_ends_a_release_before_it_compiles(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(release, "ensure", lambda **_: pytest.fail("it compiles"))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    assert release.main([str(tmp_path / "dist")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("release: error: SOURCE_DATE_EPOCH") and f"found {text}; " in said
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize("text", ["315532800", "4294967295"])
def test_the_first_and_the_last_time_of_a_release(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    monkeypatch.setattr(release, "git", lambda *_: "LICENSE\0")
    seconds = release.commit_time()
    with tarfile.open(release.make_sdist(tmp_path, "1.0", seconds)) as archive:
        assert {entry.mtime for entry in archive} == {int(text)}
    write_zip(tmp_path / "a.zip", {"a": b""}, [], datetime.fromtimestamp(seconds, UTC))
    with zipfile.ZipFile(tmp_path / "a.zip") as wheel:
        assert wheel.infolist()[0].date_time[0] == datetime.fromtimestamp(seconds, UTC).year


@pytest.mark.parametrize("name", ["CC", "CXX"])
def test_a_release_refuses_flags_of_a_compiler(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    for text in ("g++ -O0", "ccache g++"):
        monkeypatch.setenv(name, text)
        with pytest.raises(EngineError, match=rf"^{name}: a release is .*found {re.escape(text)}"):
            release.forget_variables(Silent())
    monkeypatch.setenv(name, "'/opt/a b/g++'")
    release.forget_variables(Silent())
    assert os.environ[name] == "'/opt/a b/g++'"


COMPILED = ("ggml/src/ggml-cpu", "ggml/src/ggml-rpc", "src", "common", "tools")
NOT_COMPILED = ("kleidiai/", "spacemit/")  # options that the wheel's builds do not set


def test_the_sbom_names_every_compiled_source_with_a_copyright_or_dedication_of_its_own(source: Path) -> None:
    cpp = source / "llama.cpp"
    files = {path for path in (cpp / "ggml/src").iterdir() if path.is_file()}
    files |= {path for folder in COMPILED for path in (cpp / folder).rglob("*")}
    found = set()
    for path in files:
        name = path.relative_to(cpp).as_posix()
        if path.suffix in (".c", ".cpp", ".h", ".hpp") and not any(each in name for each in NOT_COMPILED):
            text = path.read_text(encoding="utf-8", errors="replace")
            if any(word in text.lower() for word in ("copyright", "unencumbered", "public domain")):
                found.add(f"llama.cpp/{name}")
    assert "llama.cpp/ggml/src/ggml-cpu/llamafile/sgemm.cpp" in found
    assert found <= {each.notice for each in components(load_pin())}
    mozilla = notices(source, load_pin())["tinyBLAS.txt"]
    assert mozilla.startswith(b"// Copyright 2024 Mozilla Foundation") and b"NONINFRINGEMENT" in mozilla


def test_the_sbom_names_everything_in_the_vendor_folder(source: Path) -> None:
    places = {
        "nlohmann-json": "nlohmann",
        "stb_image": "stb",
        "subprocess.h": "sheredom",
        "xxHash": "hash/xxhash",
    }
    places |= {name: f"hash/{name.removesuffix('.c')}" for name in ("sha1", "sha256.c", "rotate-bits")}
    named = {places.get(each.name, each.name) for each in components(load_pin())}
    vendor = source / "llama.cpp/vendor"
    folders = {path.parent.relative_to(vendor).as_posix() for path in vendor.rglob("*.h*")} - {"hash"}
    assert folders <= named
    document: Mapping[str, list[Mapping[str, str]]] = json.loads(sbom(source, load_pin(), "1.0", "MIT"))
    versions = {part["name"]: part["version"] for part in document["components"]}
    assert versions["nlohmann-json"].count(".") == 2
    assert all(versions.values())
    texts = notices(source, load_pin())
    assert all(len(text) > 15 for text in texts.values())
    assert b"MIT License" in texts["llama.cpp.txt"]


def test_the_sdist_has_the_tracked_files_and_no_others(wheel: Path) -> None:
    (sdist,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
        assert all(member.mtime == SECONDS and member.uid == 0 for member in archive.getmembers())
    assert names == {*filter(None, release.git("ls-files", "-z").split("\0")), "PKG-INFO"}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no manylinux policy")
def test_a_wheel_that_needs_more_than_the_policy_is_refused(wheel: Path, engine: Engine) -> None:
    """This machine's own build needs OpenMP's runtime, which the policy does not allow."""
    with pytest.raises(EngineError, match="manylinux_2_34"):
        release.check_policy(wheel, engine)
