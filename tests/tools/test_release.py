"""The release: a wheel that contains the engine, an sdist, an SBOM."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from kimi_gguf.engine import build
from kimi_gguf.engine.build_spec import make_build_spec
from kimi_gguf.engine.builds import Engine, upstream_source
from kimi_gguf.engine.errors import EngineError
from kimi_gguf.engine.progress import Silent
from kimi_gguf.engine.version import VERSION
from kimi_gguf.engine.wheel import record_line
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


def make(folder: Path, engine: Engine, source: Path) -> list[Path]:
    """What tools/release writes, with this machine's build in place of one for all CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", str(SECONDS))
        patch.setattr(release, "ensure", lambda **_: engine)
        patch.setattr(release, "upstream_source", lambda: source)
        patch.setattr(release, "check_policy", lambda *_: None)
        return release.release(folder, Silent())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, engine: Engine, source: Path) -> list[Path]:
    """The files of the release. Its folder had a wheel of the same version."""
    folder = tmp_path_factory.mktemp("release")
    (folder / f"kimi_gguf-{VERSION}-py3-none-elsewhere.whl").write_bytes(b"of another run")
    return make(folder, engine, source)


@pytest.fixture(scope="module")
def wheel(made: list[Path]) -> Path:
    return made[0]


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


@pytest.mark.full
def test_equal_inputs_give_equal_bytes(
    made: list[Path], tmp_path: Path, engine: Engine, source: Path, monkeypatch: pytest.MonkeyPatch
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
    shutil.copytree(engine.folder, tmp_path / "folder")
    moved = replace(engine, key=there.key, folder=tmp_path / "folder", manifest=manifest)
    again = make(tmp_path / "again", moved, source)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in made]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("/usr/bin/cc: cc (Debian 12.2.0-14) 12.2.0", "GCC (Debian 12.2.0-14) 12.2.0"),
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


def test_the_hashes_are_those_of_what_one_run_made(made: list[Path]) -> None:
    """Not of what the folder had before."""
    *files, sums = made
    listed = dict(reversed(line.split()) for line in sums.read_text().splitlines())
    assert listed == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert len(files) == 3


def test_files_that_change_while_the_engine_compiles_are_not_packed(
    engine: Engine, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        edit("after", False)
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
    tracked = map(Path, release.git("ls-files", "convert", "engine", "patches", "validate").splitlines())
    data = {f"kimi_gguf/{path}" for path in tracked if path.suffix not in (".py", ".md", ".pr")}
    assert sorted(data - set(modes)) == [] and not [name for name in modes if name.endswith(".pr")]
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"{ENGINE}manifest.json").decode()
    assert json.loads(text)["built"] == "2026-01-01T00:00:00Z"
    assert "/usr" not in text and str(Path.home()) not in text, "folders of this machine"


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
    packages |= {
        "convert",
        *(f"convert.{name}" for name in ("adapter", "card", "model", "output", "source", "types")),
    }
    inside = {name.removeprefix("kimi_gguf.") for name in sources}
    assert {name for name in inside if any(other.startswith(f"{name}.") for other in inside)} == packages
    scripts = {name for name in inside if name.startswith("scripts.")}
    assert scripts == {"scripts.commands", "scripts.kimi_llama", "scripts.llama_tools"}
    # What users start: the commands, and llama_cpp from Python.
    reached, names = set(), ["scripts.commands", "engine.llama_cpp"]
    names = [f"kimi_gguf.{name}" for name in names]
    while names:
        name = names.pop()
        if name in sources and name not in reached:
            reached.add(name)
            names += [*imports(sources[name]), name.rpartition(".")[0]]
    assert sorted(sources.keys() - reached) == []


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


@pytest.mark.full
def test_the_wheel_needs_nothing_but_python(wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the report, which needs torch. Installs the packages that the wheel requires."""
    assert prove_wheel.main([str(wheel), "--without-report"]) == 0, capsys.readouterr().err


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


@pytest.mark.parametrize("text", ["abc", "315532799", "4294967296"])
def test_a_time_that_archives_cannot_have_ends_a_release_before_it_compiles(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(release, "ensure", lambda **_: pytest.fail("it compiles"))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    assert release.main([str(tmp_path / "dist")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("release: error: SOURCE_DATE_EPOCH") and f"found {text}; " in said
    assert not (tmp_path / "dist").exists()


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


def test_the_sdist_has_the_tracked_files_and_no_others(made: list[Path]) -> None:
    sdist = made[1]
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
        assert all(member.mtime == SECONDS and member.uid == 0 for member in archive.getmembers())
    assert names == {*filter(None, release.git("ls-files", "-z").split("\0")), "PKG-INFO"}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no manylinux policy")
def test_a_wheel_that_needs_more_than_the_policy_is_refused(wheel: Path, engine: Engine) -> None:
    """This machine's own build needs OpenMP's runtime, which the policy does not allow."""
    with pytest.raises(EngineError, match="manylinux_2_34"):
        release.check_policy(wheel, engine)
